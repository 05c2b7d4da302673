"""The gate before the clock: a provider that cannot run or disagrees with the reference is not timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .registry import Call, Case, Provider


@dataclass(frozen=True)
class Verdict:
    """What became of a provider: "ok", "wrong", or "missing" with the reason."""

    status: str
    reason: str | None = None


def judge(case: Case, provider: Provider, device: torch.device) -> Verdict:
    """Run a provider once and look at its result; this is also its first warm-up.

    An error counts as wrong for our own backends and as missing for the others: a rival that does not run here says
    nothing about us. Running out of memory is "missing" for all.
    """
    reason = provider.why_not(case.shape, device)
    if reason:
        return Verdict("missing", reason)
    call: Call | None = None
    try:
        call = provider.make(case)
        wrong = case.check(call())
    except (torch.OutOfMemoryError, MemoryError):
        return Verdict("missing", "out of memory")
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return Verdict("wrong" if provider.ours else "missing", f"raised {type(error).__name__}: {first_line:.200}")
    finally:
        del call  # its buffers
    return Verdict("ok") if wrong is None else Verdict("wrong", wrong)


def judge_all(case: Case, providers: Sequence[Provider], device: torch.device) -> dict[str, Verdict]:
    """Verdicts by provider."""
    return {provider.name: judge(case, provider, device) for provider in providers}
