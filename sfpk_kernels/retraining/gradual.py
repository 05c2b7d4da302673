"""Gradual pruning: the search in several shots, the model retrained after each."""

from __future__ import annotations

import logging
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.coverage import coordinates_for
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.state import seeded
from ..modeling.turns import alone, end_contexts
from ..modeling.whole_model import WholeModel, write
from ..search.energy import LossFn
from ..search.merging import mean_square, merge_into
from ..search.parts import of_covered
from ..search.polarizer import budget
from ..search.pruner import SFPKPruner
from ..search.result import PruneResult
from ..search.settings import FIELDS, check_together, chosen
from ..utils.arguments import called, check_loader, check_loss_fn
from ..utils.files import check_writable, load_state, save_state
from .gradual_state import GradualState, Progress
from .loop import RetrainConfig, check_label_smoothing, retrain, trained_parameters
from .shots import GradualResult, Shot, ShotRecord, config_of_shot, schedule_shots, spread_steps

logger = logging.getLogger(__name__)

_CALL = "GradualPruner(model, loader, sparsity, loss_fn=…, retrain=…)"
FORMAT = "sfpk-gradual-2"


RetrainFn = Callable[[nn.Module, MaskSet, Shot], Any]


class GradualPruner:
    """Prunes a model in T shots and retrains it after each (gradual pruning of the SFPK paper).

    Shot i searches on from the particles of shot i - 1, from density ρ_{i-1} to ρ_i (:func:`schedule_shots`), applies
    the mask and retrains with the mask enforced. Together the shots take the forward/backward passes of a one-shot run
    with the same config: n · K, or, with ``merge``, fewer from that step of all of them on, whichever shot it is in.

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
        growth: of the retraining budget from shot to shot, see :func:`schedule_shots`.
        progress: show bars; ``None`` for only on a terminal.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        TypeError, ValueError: a bad argument; as for :class:`SFPKPruner`.
    """

    @called(_CALL, **FIELDS)
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
        if config.pattern is not None and shots != 1:
            raise ValueError(
                "config: wanted pattern=None, as the shots before the last have other sparsities than that of the "
                f"pattern, got {config.pattern}: prune in one shot, then finetune_masked(…)"
            )
        if config.granularity != "weight":
            raise ValueError(
                f"config: wanted granularity='weight' in gradual pruning, got {config.granularity!r}: prune(…), then "
                "retrain what result.shrink(model) returns"
            )
        schedule_shots(config, shots, growth)  # refuses before the model is looked at
        self.coordinates = coordinates_for(model, **coordinate_options)
        config = of_covered(config, self.coordinates)
        self.shots = schedule_shots(config, shots, growth)
        self.config, self.execution = config, execution
        check_together(config, execution, model)
        budget(config.sparsity, self.coordinates.d)
        self._steps: list[int] | None = None  # of the built-in retraining
        self._retrain_loader = loader if retrain_loader is None else retrain_loader
        if isinstance(retrain, RetrainConfig):
            check_label_smoothing(loss_fn, retrain)
            trained_parameters(model)
            self._steps = spread_steps(retrain.total_steps(self._retrain_loader), [shot.share for shot in self.shots])
        self._model, self._loss_fn, self._loader = model, loss_fn, loader
        self._retrain = retrain
        self._progress = progress
        self._options = coordinate_options
        self._state = GradualState(model, self.coordinates, config, execution, self.shots, self._retrain, self._steps)
        self._done = Progress(None, self.coordinates.flatten(model), [], [])
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
        return self.finished == len(self.shots)

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
        shot, before = self.shots[self.finished], self._done
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
            self._done = Progress(
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
        config = config_of_shot(self.config, shot, seed)
        held = self.coordinates.flatten(self._model)
        try:
            self._write(self._done.values)
            pruner = SFPKPruner(
                self._model,
                loss_fn=self._loss_fn,
                config=config,
                execution=self.execution,
                start=self._start(shot, config),
                **self._options,
            )
        finally:
            self._write(held)
        return pruner.run(self._loader, progress=self._progress)

    def _start(self, shot: Shot, config: SFPKConfig) -> Tensor | None:
        """Where the particles of a shot begin: merged, where those of the one before have yet to be."""
        given = self._done.particles
        if given is None or len(given) == config.n_particles:
            return given
        one = given.new_empty(1, given.shape[1])
        merge_into(one, None, given, None, mean_square(config, shot.start_density))
        return one

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
        return particles.mul_((mean_square(self.config, density) / share).sqrt().unsqueeze(1).to(particles.dtype))

    @alone
    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from the last finished shot: tensors (copies, on the CPU) and plain values.

        Raises:
            RuntimeError: an interruption has left the model half changed.
        """
        self._check_whole("state_dict")
        return self._state.state_of(self._done)

    @alone
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, model weights included.

        Raises:
            TypeError: no dict, or an entry of another type.
            ValueError: of a run with other settings or another model, or with an entry of another shape or range,
                missing or unknown; the message names it. Nothing has changed then.
        """
        given, done = self._state.checked(state, self._done.values)
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
