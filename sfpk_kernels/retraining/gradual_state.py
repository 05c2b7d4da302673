"""What a gradual run is resumed from, every entry looked at before anything changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.whole_model import spread, tensors
from ..search import checkpoint
from ..search import state_checks as check
from ..search.merging import particles_after
from ..search.parts import structure_fingerprint
from .held import Held
from .loop import RetrainConfig
from .shots import Shot, ShotRecord, config_of_shot

_PARTS = {"settings", "model", "particles", "values", "masks", "history"}


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the finished shots left; replaced as a whole."""

    particles: Tensor | None  # (n, d), (1, d) once merged; on the CPU
    values: Tensor  # (weights,) that masks cover: those of removed weights from before their removal
    masks: list[MaskSet]
    history: list[ShotRecord]


@dataclasses.dataclass(frozen=True)
class GradualState:
    """The state of a gradual run, written and read."""

    model: nn.Module
    coordinates: Coordinates
    held: Held
    config: SFPKConfig
    execution: Execution
    shots: list[Shot]
    retrain: Any  # a RetrainConfig, or a function
    steps: list[int] | None  # of the built-in retraining, by shot

    def state_of(self, done: Progress) -> dict[str, Any]:
        """Tensors (copies, on the CPU) and plain values."""
        return {
            "settings": self.settings(),
            "model": {name: tensor.detach().cpu().clone() for name, tensor in tensors(self.model).items()},
            "particles": None if done.particles is None else done.particles.clone(),
            "values": done.values.cpu().clone(),
            "masks": [torch.from_numpy(np.frombuffer(mask.to_bytes(), np.uint8).copy()) for mask in done.masks],
            "history": [dataclasses.asdict(record) for record in done.history],
        }

    def checked(
        self,
        state: Any,
        values_like: Tensor,  # (weights,)
    ) -> tuple[dict[str, Tensor], Progress]:
        """The model's tensors by name, and what the finished shots left.

        Raises:
            TypeError, ValueError: as :meth:`~sfpk_kernels.GradualPruner.load_state_dict`.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: wanted what GradualPruner.state_dict() returns, got {type(state).__name__}")
        missing, more = sorted(_PARTS - state.keys()), sorted(str(name) for name in state.keys() - _PARTS)
        if missing or more:
            what = f"without {missing}" if missing else f"with {more[:5]}, which none has"
            raise ValueError(f"state: wanted what GradualPruner.state_dict() returns, got one {what}")
        mine, theirs = self.settings(), state["settings"]
        if not isinstance(theirs, Mapping):
            raise TypeError(f"state: settings: wanted a dict, got {check.got(theirs)}")
        saved = theirs.get("config")
        theirs = {**theirs, "config": checkpoint.settings_of_this_version(saved)}
        differing = [key for key in {**mine, **theirs} if not check.same(mine.get(key, ""), theirs.get(key, ""))]
        if differing:
            of = "; ".join(f"{key}: {mine.get(key)!r} here, {theirs.get(key)!r} there" for key in differing)
            raise ValueError(f"state: settings: wanted one of a run with the same settings, got another: {of}")
        given = self._checked_model(state["model"])
        shots = check.sequence("state: history", state["history"])
        if len(shots) > len(self.shots):
            raise ValueError(f"state: history: wanted at most {len(self.shots)} shots, got {len(shots)}")
        masks = self._checked_masks(state["masks"], len(shots))
        history = [self._checked_record(i, value, masks, saved) for i, value in enumerate(shots)]
        values = check.tensor("state: values", state["values"], tuple(values_like.shape), values_like.dtype)
        done = Progress(
            self._checked_particles(state["particles"], history),
            values.to(values_like.device, copy=True),
            masks,
            history,
        )
        return given, done

    def _checked_model(self, value: Any) -> dict[str, Tensor]:
        if not isinstance(value, Mapping):
            raise TypeError(f"state: model: wanted a dict of tensors, got {check.got(value)}")
        mine = tensors(self.model)
        for name in {**mine, **value}:
            if name in value and not isinstance(value[name], Tensor):
                raise TypeError(f"state: model: {name}: wanted a tensor, got {check.got(value[name])}")
        wrong = [
            str(name)
            for name in {**mine, **value}
            if name not in mine or name not in value or _kind(mine[name]) != _kind(value[name])
        ]
        if wrong:
            raise ValueError(f"state: model: wanted one of the same model, got another: {', '.join(wrong[:5])} differ")
        found = {}
        for name, tensor in mine.items():
            # Some models hold infinities, such as masks of attention; no run makes any.
            finite = check.is_finite(tensor.detach())
            found[name] = check.tensor(
                f"state: model: {name}", value[name], tuple(tensor.shape), tensor.dtype, finite=finite
            )
            if spread(tensor) and not torch.equal(found[name].to(tensor.device), tensor):
                raise ValueError(f"state: model: {name}: wanted the values it has, as its elements share memory")
        return found

    def _checked_masks(self, value: Any, count: int) -> list[MaskSet]:
        shapes = self.held.shapes
        found, contents = [], check.sequence("state: masks", value)
        if len(contents) != count:
            raise ValueError(f"state: masks: wanted {count}, one for every shot of history, got {len(contents)}")
        for i, content in enumerate(contents):
            name = f"state: masks[{i}]"
            size = (content.numel(),) if isinstance(content, Tensor) and not content.is_nested else (0,)
            content = check.tensor(name, content, size, torch.uint8).cpu()
            try:
                masks = MaskSet.from_bytes(content.numpy().tobytes())
            except ValueError as error:
                raise ValueError(f"{name}: wanted the bytes of a mask file, got others: {error}") from error
            if masks.shapes != shapes:
                raise ValueError(f"{name}: wanted masks of this model's prunable tensors, got others")
            self.held.check(name, masks)
            found.append(masks)
        return found

    def _checked_record(self, i: int, value: Any, masks: list[MaskSet], settings: Any) -> ShotRecord:
        name, shot = f"state: history[{i}]", self.shots[i]
        check.entries(name, value, [field.name for field in dataclasses.fields(ShotRecord)])
        if not check.same(value["shot"], dataclasses.asdict(shot)):
            raise ValueError(f"{name}.shot: wanted {dataclasses.asdict(shot)}, got another")
        kept = check.integer(f"{name}.kept", value["kept"])
        if kept != masks[i].kept:
            raise ValueError(f"{name}.kept: wanted {masks[i].kept}, as in masks[{i}], got {kept}")
        config, search = config_of_shot(self.config, shot, 0), value["search"]
        search = checkpoint.history(
            f"{name}.search",
            checkpoint.records_of_this_version(search, settings),
            config,
            len(self.coordinates.tensors),
        )
        if not 1 <= len(search) <= shot.n_steps:
            raise ValueError(f"{name}.search: wanted 1 … {shot.n_steps} steps, got {len(search)}")
        steps = 0 if self.steps is None else self.steps[i]
        losses = check.reals(f"{name}.losses", value["losses"], steps)
        return ShotRecord(shot, kept, check.integer(f"{name}.returned", value["returned"], 0, kept), search, losses)

    def _checked_particles(self, value: Any, history: list[ShotRecord]) -> Tensor | None:
        name, finished = "state: particles", len(history)
        if not finished:
            if value is not None:
                raise ValueError(f"{name}: wanted None before the first shot, got {check.got(value)}")
            return None
        config = self.config
        dtype = self.coordinates.dtype if config.particle_dtype == "float32" else getattr(torch, config.particle_dtype)
        rows = particles_after(config_of_shot(config, history[-1].shot, 0), len(history[-1].search))
        found = check.tensor(name, value, (rows, self.coordinates.d), dtype).to("cpu", copy=True)
        share = found.double().square().mean(dim=1)
        density = float((share.sqrt() if config.density == "l2" else share).mean())
        low = self.shots[finished].density if finished < len(self.shots) else 0.0  # else the next shot could not begin
        if not low < density <= 1.0 + 1e-6:
            raise ValueError(f"{name}: wanted a mean density above {low:g}, at most 1, got {density:g}")
        return found

    def settings(self) -> dict[str, Any]:
        """What must be the same to go on."""
        how, structure = self.retrain, structure_fingerprint(self.coordinates)
        return {
            "config": {**self.config.to_dict(), **self.execution.to_dict()},
            "plan": [dataclasses.asdict(shot) for shot in self.shots],
            "retrain": dataclasses.asdict(how) if isinstance(how, RetrainConfig) else "function",
            "retraining steps": self.steps,
            "prunable": [[name, list(shape)] for name, shape in self.held.shapes.items()],
            **({} if structure is None else {"structure": structure}),
        }


def _kind(tensor: Tensor) -> tuple[torch.Size | None, torch.dtype]:
    return None if tensor.is_nested else tensor.shape, tensor.dtype
