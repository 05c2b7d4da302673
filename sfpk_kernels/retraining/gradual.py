"""Gradual pruning: the search in several shots, the model retrained after each."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.state import seeded
from ..modeling.turns import alone, end_contexts
from ..modeling.whole_model import WholeModel, spread, tensors, write
from ..search import checkpoint
from ..search import state_checks as check
from ..search.energy import LossFn
from ..search.polarizer import budget
from ..search.pruner import SFPKPruner
from ..search.records import StepRecord
from ..search.result import PruneResult
from ..search.settings import check_together, chosen
from ..utils.arguments import called, check_loader, check_loss_fn
from ..utils.files import check_writable, load_state, save_state
from .loop import RetrainConfig, check_label_smoothing, retrain, trained_parameters

logger = logging.getLogger(__name__)

_CALL = "GradualPruner(model, loader, sparsity, loss_fn=…, retrain=…)"
FORMAT = "sfpk-gradual-2"

_PARTS = {"settings", "model", "particles", "values", "masks", "history"}


@dataclasses.dataclass(frozen=True)
class Shot:
    """What one shot does."""

    number: int  # 1 … T
    shots: int  # T
    start_density: float  # fraction kept before it
    density: float  # fraction kept after it
    n_steps: int  # of the search
    share: float  # of the retraining budget; those of all shots add up to 1

    @property
    def sparsity(self) -> float:
        """Fraction removed after it."""
        return 1.0 - self.density


@dataclasses.dataclass(frozen=True)
class ShotRecord:
    """What happened in one shot."""

    shot: Shot
    kept: int  # weights
    returned: int  # weights that an earlier shot had removed and this one kept
    search: list[StepRecord]
    losses: list[float]  # of every retraining step; empty where a function of your own retrains


@dataclasses.dataclass(frozen=True)
class GradualResult:
    """Outcome of a gradual run; the model holds the retrained weights."""

    mask: MaskSet  # the final mask
    masks: list[MaskSet]  # after every shot; its weights were those retrained up to there
    history: list[ShotRecord]
    particles: Tensor  # (n, d), on the CPU
    config: SFPKConfig


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What the finished shots left; replaced as a whole."""

    particles: Tensor | None  # (n, d), on the CPU
    values: Tensor  # (d,): those of removed weights from before their removal
    masks: list[MaskSet]
    history: list[ShotRecord]


RetrainFn = Callable[[nn.Module, MaskSet, Shot], Any]


def plan_shots(
    config: SFPKConfig,
    shots: int,
    growth: float | None = None,
) -> list[Shot]:
    """Densities, search steps and retraining shares of T shots to sparsity s.

    Density after shot i: ρ_i = (1 - s)^(i/T), so every shot keeps the same fraction of what was left. Search steps: K
    in all, spread evenly. Retraining: shot i gets g^(i-1)·(g - 1)/(g^T - 1) of the total budget, which rises
    exponentially and adds up to 1; with the default g = (1 - s)^(-1/T) it is inversely proportional to the density.

    Args:
        config: of the whole run; K = ``n_steps``.
        shots: T ≥ 1, at most K.
        growth: g ≥ 1 (1: the same budget for every shot); ``None`` for the default.

    Raises:
        TypeError, ValueError: a bad ``shots`` or ``growth``.
    """
    if isinstance(shots, bool) or not isinstance(shots, numbers.Integral):
        raise TypeError(f"shots: wanted an integer ≥ 1, got {shots!r}")
    if not 1 <= shots <= config.n_steps:
        raise ValueError(f"shots: wanted 1 … {config.n_steps} (at most config.n_steps), got {shots!r}")
    if growth is not None and (isinstance(growth, bool) or not isinstance(growth, numbers.Real)):
        raise TypeError(f"growth: wanted a number ≥ 1 or None, got {growth!r}")
    if growth is not None and not 1 <= growth < float("inf"):
        raise ValueError(f"growth: wanted a number ≥ 1 or None, got {growth!r}")
    total, kept = int(shots), config.target_density
    g = kept ** (-1 / total) if growth is None else float(growth)
    densities = [kept ** (i / total) for i in range(total)] + [kept]
    steps = [round(config.n_steps * i / total) for i in range(total + 1)]
    weights = [g ** (i - total) for i in range(total)]
    return [
        Shot(i + 1, total, densities[i], densities[i + 1], steps[i + 1] - steps[i], weights[i] / sum(weights))
        for i in range(total)
    ]


class GradualPruner:
    """Prunes a model in T shots and retrains it after each (gradual pruning of the SFPK paper).

    Shot i searches on from the particles of shot i - 1, from density ρ_{i-1} to ρ_i (:func:`plan_shots`), applies the
    mask and retrains with the mask enforced. Together the shots take the n · K forward/backward passes of a one-shot
    run with the same config.

    Unlike :func:`~sfpk_kernels.prune` this CHANGES the model: :meth:`run` leaves it pruned and retrained, in place
    (parameters keep their identity). After an error or an interruption it is as after the last finished shot: weights,
    buffers, modes, gradients and ``requires_grad`` flags; :meth:`run` and :meth:`shot` then begin that shot anew. Where
    even that was interrupted they say so, and the file of ``run(save=…)`` can be resumed.

    A removed weight stays in the search with the value it had when it was removed, as removed coordinates do within
    one run of the method: they get a gradient, and a later shot may keep them again. So the masks need not be nested.

    Args:
        model: the trained model, on one device.
        loader: batches of the search, as for :meth:`SFPKPruner.run`; every shot begins at its first batch. A one-shot
            iterator has to last for all of them.
        sparsity: the final one; everything else of the search at its default.
        loss_fn: ``loss_fn(model, batch) -> scalar``, for search and retraining; ``None`` for the default loss.
        config: instead of ``sparsity``: final sparsity, search steps of all shots together, everything else of the
            search.
        execution: how the search is computed.
        shots: T.
        retrain: epochs over all shots together; or a :class:`RetrainConfig`, whose ``epochs`` are those; or a function
            ``retrain(model, masks, shot)``, which trains in place, to spend ``shot.share`` of its budget, with masks
            enforced (``masks.enforce(optimizer, model)``). The model is masked once more after it. It should make its
            optimizer anew for every shot: one that it keeps is not put back when a shot is begun anew.
        retrain_loader: batches of the built-in retraining, with a length (which a DataLoader over an IterableDataset
            has not); ``None`` for ``loader``.
        growth: of the retraining budget from shot to shot, see :func:`plan_shots`.
        progress: show bars; ``None`` for only on a terminal.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        TypeError, ValueError: a bad argument; as for :class:`SFPKPruner`.
    """

    @called(_CALL)
    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        sparsity: float | None = None,
        *,
        loss_fn: LossFn | None = None,
        config: SFPKConfig | None = None,
        execution: Execution | None = None,
        shots: int = 10,
        retrain: float | RetrainConfig | RetrainFn,
        retrain_loader: Iterable[Any] | None = None,
        growth: float | None = None,
        progress: bool | None = None,
        **coordinate_options: Any,
    ):
        config, execution = chosen(_CALL, sparsity, config, execution)
        check_loader(loader)
        check_loss_fn(loss_fn)
        if isinstance(retrain, numbers.Real) and not isinstance(retrain, bool):
            retrain = RetrainConfig(epochs=float(retrain))
        if not isinstance(retrain, RetrainConfig) and not callable(retrain):
            raise TypeError(f"retrain: wanted epochs, a RetrainConfig or a function, got {retrain!r}")
        if config.settle:
            raise ValueError("config: wanted settle=False: every shot slows down towards its own density, got True")
        self.plan = plan_shots(config, shots, growth)
        self.config, self.execution = config, execution
        self.coordinates = Coordinates(model, **coordinate_options)
        check_together(config, execution, model)
        budget(config.sparsity, self.coordinates.d)
        self._steps: list[int] | None = None  # of the built-in retraining
        self._retrain_loader = loader if retrain_loader is None else retrain_loader
        if isinstance(retrain, RetrainConfig):
            check_label_smoothing(loss_fn, retrain)
            trained_parameters(model)
            self._steps = _spread(retrain.total_steps(self._retrain_loader), [shot.share for shot in self.plan])
        self._model, self._loss_fn, self._loader = model, loss_fn, loader
        self._retrain = retrain
        self._progress = progress
        self._options = coordinate_options
        self._done = _Progress(None, self.coordinates.flatten(model), [], [])
        self._broken: str | None = None  # why the model is not as after the last finished shot
        self._saved: tuple[str, int] | None = None  # the last file, and the shots in it

    @property
    def _particles(self) -> Tensor | None:
        return self._done.particles

    @property
    def finished(self) -> int:
        """Shots done, 0 … T."""
        return len(self._done.history)

    @property
    def done(self) -> bool:
        """Whether all shots are done."""
        return self.finished == len(self.plan)

    def run(
        self, *, save: str | os.PathLike[str] | None = None, resume: str | os.PathLike[str] | bool | None = None
    ) -> GradualResult:
        """All remaining shots.

        Args:
            save: a file written after every shot, atomically: a run killed at any moment finds there the last finished
                shot.
            resume: a file written so, to go on from (True: ``save``, if it exists); the model takes over the weights in
                it. With any ``energy_mode`` but ``"timed"``, and loaders that draw their order from torch's global
                generator (or have a fixed one) without ``persistent_workers``, the outcome is that of an uninterrupted
                run, bit for bit.

        Raises:
            FileNotFoundError: ``resume`` is no file, or ``save`` in no folder.
            OSError: ``save`` cannot be written, before the first shot or after one; that shot is not lost, the model
                and :meth:`result` have it.
            ValueError: ``resume`` belongs to another run, or was cut or altered. Nothing has changed then.
            FloatingPointError: a loss that is not finite, in search or retraining.
            RuntimeError: an interruption has left the model half changed; ``resume`` puts it right.
        """
        if save is not None:
            check_writable(save, "save")
        if isinstance(resume, bool):
            if resume and save is None:
                raise ValueError("resume: wanted a file, or True beside save=, got True alone")
            resume = save if resume and save is not None and os.path.exists(save) else None
        if resume is not None:
            self.load_state_dict(load_state(resume, FORMAT))
            self._saved = os.path.realpath(resume), self.finished
        self._check_whole("run")
        if self.done:
            self._save(save)  # an interruption came before it
        while not self.done:
            self.shot()
            self._save(save)
        return self.result()

    def _save(self, path: str | os.PathLike[str] | None) -> None:
        """Unless it is there already."""
        if path is not None and self._saved != (os.path.realpath(path), self.finished):
            save_state(path, FORMAT, self.state_dict())
            self._saved = os.path.realpath(path), self.finished

    def _check_whole(self, what: str) -> None:
        if self._broken is not None:
            raise RuntimeError(
                f"{what}: the model is not as after the last finished shot: {self._broken}; go on from a file of "
                "run(save=…): run(resume=…)"
            )

    @alone
    def shot(self) -> ShotRecord:
        """The next shot: search, mask, retrain.

        Raises:
            RuntimeError: all shots are done. Others as for :meth:`run`.
        """
        self._check_whole("shot")
        if self.done:
            raise RuntimeError(f"shot: the run is over after {self.finished} shots")
        shot, before = self.plan[self.finished], self._done
        seed = self.config.seed * 10_007 + shot.number
        whole = WholeModel(self._model)
        self._broken = f"shot {shot.number} stopped half-way"
        try:
            found = self._search(shot, seed)
            whole.put_gradients_aside()
            self._write(before.values)  # those that return bring their values along
            found.mask.apply_(self._model)
            losses = self._train(shot, found.mask, seed)
            found.mask.apply_(self._model)
            trained = self.coordinates.flatten(self._model)  # refuses weights that are not finite
            whole.restore_modes()
            mask = found.mask.flat().to(trained.device)
            returned = int((mask & ~before.masks[-1].flat().to(mask.device)).sum()) if before.masks else 0
            record = ShotRecord(shot, found.mask.kept, returned, found.history, losses)
            self._done = _Progress(
                self._on_schedule(found.particles.detach().cpu().clone(), shot.density),
                torch.where(mask, trained, before.values),
                [*before.masks, found.mask],
                [*before.history, record],
            )
            self._broken = None
        except BaseException as error:
            end_contexts(error)
            self._broken = f"putting back shot {shot.number} stopped half-way"
            whole.restore()
            self._done = before
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note(
                    f"sfpk_kernels: in shot {shot.number} of {shot.shots}; the model is as "
                    f"{f'after shot {self.finished}' if self.finished else 'before the first shot'}"
                )
            self._broken = None
            raise
        logger.info(
            "shot %d of %d: %.4f of the weights kept, %d returned, loss %s",
            shot.number, shot.shots, shot.density, returned, f"{losses[-1]:.4f}" if losses else "not known",
        )  # fmt: skip
        return record

    def result(self) -> GradualResult:
        """What the finished shots gave.

        Raises:
            RuntimeError: no shot is finished.
        """
        self._check_whole("result")
        done = self._done
        if done.particles is None:
            raise RuntimeError("result: wanted at least one shot done, got none")
        return GradualResult(done.masks[-1], list(done.masks), list(done.history), done.particles, self.config)

    def _search(self, shot: Shot, seed: int) -> PruneResult:
        config = self._config_of(shot, seed)
        held = self.coordinates.flatten(self._model)
        try:
            self._write(self._done.values)
            pruner = SFPKPruner(
                self._model,
                loss_fn=self._loss_fn,
                config=config,
                execution=self.execution,
                start=self._done.particles,
                **self._options,
            )
        finally:
            self._write(held)
        return pruner.run(self._loader, progress=self._progress)

    def _config_of(self, shot: Shot, seed: int) -> SFPKConfig:
        config = self.config.replace(sparsity=shot.sparsity, n_steps=shot.n_steps, seed=seed)
        if shot.number == shot.shots:  # without the rounding of 1 - (1 - s)
            config = config.replace(sparsity=self.config.sparsity)
        return config

    def _train(self, shot: Shot, masks: MaskSet, seed: int) -> list[float]:
        if isinstance(self._retrain, RetrainConfig):
            steps = None if self._steps is None else self._steps[shot.number - 1]
            return retrain(
                self._model,
                self._retrain_loader,
                masks,
                self._retrain,
                loss_fn=self._loss_fn,
                steps=steps,
                seed=seed,
                progress=self._progress,
            )
        with seeded(seed, self.coordinates.device):
            self._retrain(self._model, masks, shot)
        return []

    @torch.no_grad()
    def _write(self, flat: Tensor) -> None:
        for parameter, values in zip(
            self.coordinates.parameters(self._model), self.coordinates.split(flat), strict=True
        ):
            parameter.copy_(values)

    def _on_schedule(self, particles: Tensor, density: float) -> Tensor:
        """Particles that were not retracted have drifted: put on the density that the next shot starts from."""
        if self.config.retract:
            return particles
        share = particles.double().square().mean(dim=1)
        return particles.mul_((_square(density, self.config.density) / share).sqrt().unsqueeze(1).to(particles.dtype))

    @alone
    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from the last finished shot: tensors (copies, on the CPU) and plain values.

        Raises:
            RuntimeError: an interruption has left the model half changed.
        """
        self._check_whole("state_dict")
        done = self._done
        return {
            "settings": self._settings(),
            "model": {name: tensor.detach().cpu().clone() for name, tensor in tensors(self._model).items()},
            "particles": None if done.particles is None else done.particles.clone(),
            "values": done.values.cpu().clone(),
            "masks": [torch.from_numpy(np.frombuffer(mask.to_bytes(), np.uint8).copy()) for mask in done.masks],
            "history": [dataclasses.asdict(record) for record in done.history],
        }

    @alone
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, model weights included.

        Raises:
            TypeError: no dict, or an entry of another type.
            ValueError: of a run with other settings or another model, or with an entry of another shape or range,
                missing or unknown; the message names it. Nothing has changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: wanted what GradualPruner.state_dict() returns, got {type(state).__name__}")
        missing, more = sorted(_PARTS - state.keys()), sorted(str(name) for name in state.keys() - _PARTS)
        if missing or more:
            what = f"without {missing}" if missing else f"with {more[:5]}, which none has"
            raise ValueError(f"state: wanted what GradualPruner.state_dict() returns, got one {what}")
        mine, theirs = self._settings(), state["settings"]
        if not isinstance(theirs, Mapping):
            raise TypeError(f"state: settings: wanted a dict, got {check.got(theirs)}")
        theirs = {**theirs, "config": checkpoint.settings_of_this_version(theirs.get("config"))}
        differing = [key for key in {**mine, **theirs} if not check.same(mine.get(key, ""), theirs.get(key, ""))]
        if differing:
            of = "; ".join(f"{key}: {mine.get(key)!r} here, {theirs.get(key)!r} there" for key in differing)
            raise ValueError(f"state: settings: wanted one of a run with the same settings, got another: {of}")
        given = self._checked_model(state["model"])
        shots = check.sequence("state: history", state["history"])
        if len(shots) > len(self.plan):
            raise ValueError(f"state: history: wanted at most {len(self.plan)} shots, got {len(shots)}")
        masks = self._checked_masks(state["masks"], len(shots))
        history = [self._checked_record(i, value, masks) for i, value in enumerate(shots)]
        values = check.tensor("state: values", state["values"], (self.coordinates.d,), self._done.values.dtype)
        done = _Progress(
            self._checked_particles(state["particles"], len(shots)),
            values.to(self._done.values.device, copy=True),
            masks,
            history,
        )
        # All of it has been looked at. What stops from here on is put back, or said.
        whole, before, broken = WholeModel(self._model), self._done, self._broken
        self._broken = "loading a state stopped half-way"
        try:
            write(self._model, given)
            self._done, self._saved = done, None
            self._broken = None
        except BaseException:
            self._broken = "loading a state stopped half-way"
            whole.restore()
            self._done = before
            self._broken = broken
            raise

    def _checked_model(self, value: Any) -> dict[str, Tensor]:
        if not isinstance(value, Mapping):
            raise TypeError(f"state: model: wanted a dict of tensors, got {check.got(value)}")
        mine = tensors(self._model)
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
        shapes = {tensor.name: tuple(tensor.shape) for tensor in self.coordinates.tensors}
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
            found.append(masks)
        return found

    def _checked_record(self, i: int, value: Any, masks: list[MaskSet]) -> ShotRecord:
        name, shot = f"state: history[{i}]", self.plan[i]
        check.entries(name, value, [field.name for field in dataclasses.fields(ShotRecord)])
        if not check.same(value["shot"], dataclasses.asdict(shot)):
            raise ValueError(f"{name}.shot: wanted {dataclasses.asdict(shot)}, got another")
        kept = check.integer(f"{name}.kept", value["kept"])
        if kept != masks[i].kept:
            raise ValueError(f"{name}.kept: wanted {masks[i].kept}, as in masks[{i}], got {kept}")
        search = checkpoint.history(
            f"{name}.search", value["search"], self._config_of(shot, 0), len(self.coordinates.tensors)
        )
        if not 1 <= len(search) <= shot.n_steps:
            raise ValueError(f"{name}.search: wanted 1 … {shot.n_steps} steps, got {len(search)}")
        steps = 0 if self._steps is None else self._steps[i]
        losses = check.reals(f"{name}.losses", value["losses"], steps)
        return ShotRecord(shot, kept, check.integer(f"{name}.returned", value["returned"], 0, kept), search, losses)

    def _checked_particles(self, value: Any, finished: int) -> Tensor | None:
        name = "state: particles"
        if not finished:
            if value is not None:
                raise ValueError(f"{name}: wanted None before the first shot, got {check.got(value)}")
            return None
        config = self.config
        dtype = self.coordinates.dtype if config.particle_dtype == "float32" else getattr(torch, config.particle_dtype)
        found = check.tensor(name, value, (config.n_particles, self.coordinates.d), dtype).to("cpu", copy=True)
        share = found.double().square().mean(dim=1)
        density = float((share.sqrt() if config.density == "l2" else share).mean())
        low = self.plan[finished].density if finished < len(self.plan) else 0.0  # else the next shot could not begin
        if not low < density <= 1.0 + 1e-6:
            raise ValueError(f"{name}: wanted a mean density above {low:g}, at most 1, got {density:g}")
        return found

    def _settings(self) -> dict[str, Any]:
        """What must be the same to go on."""
        how = self._retrain
        return {
            "config": {**self.config.to_dict(), **self.execution.to_dict()},
            "plan": [dataclasses.asdict(shot) for shot in self.plan],
            "retrain": dataclasses.asdict(how) if isinstance(how, RetrainConfig) else "function",
            "retraining steps": self._steps,
            "prunable": [[tensor.name, list(tensor.shape)] for tensor in self.coordinates.tensors],
        }


def _spread(total: int, shares: list[float]) -> list[int]:
    """Whole numbers with the sum ``total``, cumulatively rounded."""
    ends = [round(total * sum(shares[: i + 1])) for i in range(len(shares))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _square(density: float, kind: str) -> float:
    """Mean square of a particle with that soft density."""
    return density**2 if kind == "l2" else density


def _kind(tensor: Tensor) -> tuple[torch.Size | None, torch.dtype]:
    return None if tensor.is_nested else tensor.shape, tensor.dtype
