"""Dispatch modes of torch: none stays on, whenever an interruption comes."""

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from sfpk_kernels.utils import memory, modes

from .interruptions import every_moment


def on():
    return torch._C._len_torch_dispatch_stack(), is_in_torch_dispatch_mode(), is_in_torch_dispatch_mode(False)


def test_no_mode_stays_whenever_it_is_interrupted():
    def work():
        assert memory.peak_bytes(lambda: torch.ones(4), torch.device("cpu")) == 16

    moments, left = 0, []
    for raised in every_moment(work, [_python_dispatch.__file__, modes.__file__]):
        moments += 1
        place = str(raised)
        del raised
        if on() != (0, False, False):
            left.append((place, on()))
    assert not left
    assert moments > 40


def test_modes_outside_stay_on():
    with FlopCounterMode(display=False) as outer:
        before = on()
        assert memory.peak_bytes(lambda: torch.ones(2, 3) @ torch.ones(3, 4), torch.device("cpu")) == 4 * (6 + 12 + 8)
        assert on() == before
    assert outer.get_total_flops() == 2 * 2 * 3 * 4
    assert on() == (0, False, False)
