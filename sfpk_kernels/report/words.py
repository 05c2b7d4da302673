"""What the words of the page mean; each is explained where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTICLE = (
    "a candidate mask: a number per prunable weight, that says how much it counts. SFPK moves a few of them from all "
    "weights kept to the target, each by the gradient on a mini-batch of its own, and takes one mask from what they "
    "agree on"
)
KEPT = "Prunable are the weights that a mask may remove. Removed ones are set to 0; kept ones stay as they were."
SPARSITY = "The share of the prunable weights that the mask removes."
COVERED = "The masks cover the prunable weights; all other parameters stay as they are. Tied ones count once."
REMOVED = "The removed weights as a share of all parameters of the model, not only the prunable ones."
FINGERPRINT = "The beginning of a hash of the mask: equal masks have equal fingerprints."
STEPS = (
    "A step takes the loss and its gradient once per particle, and moves each. Merged particles go on as their mean."
)
SECONDS = "Of the steps, all together."
METHOD = "What chose the mask: a method to compare the search with, a function of sfpk_kernels.baselines."
METHOD_SECONDS = "That the method took."
LOSS = "As loss_fn measures it on the mini-batches of these two steps, the mean of the particles."
KNEE = (
    "The sparsity at which the loss turns up: where its smoothed curve lies farthest below the straight line between "
    "its ends. Until there removing weights costs little, from there on more and more. None is named for fewer than "
    "8 steps, for a rise within what batches differ by, for a curve that only flattens, and for a run that settles at "
    "its waypoints."
)
EFFECTIVE = (
    "How many different binary masks the particles stand for, n² / Σ IoU²: 1 where all are alike, all of them where "
    "no two share a weight. At the beginning all keep everything, and count as 1."
)
ENERGIES = "Energy is the loss of a particle; this is how the particles went through the model, and why so."
MEMORY = "What the plan said before the run; predicted, not measured."
SALIENCY = "How much a weight counts; a particle made binary, and the final mask, keep the weights of highest saliency."
SCORES = {
    "mask": "Here m, the particle's number alone.",
    "mask_weight": "Here |m|·|θ|: the particle's number times the size of the weight.",
    "mask_normalized": "Here |m|·|θ|, the particle's number times the size of the weight, over the mean size in its "
    "tensor, so that layers of different scale compare.",
}
ALARMS = "What looked wrong on the way. The run went on; whether it matters is for you to judge."
EVALUATION = (
    "Of the same model before pruning (dense) and with the mask above (pruned), as an evaluation outside of the run "
    "measured it and handed it to the report."
)
RETRAINED = (
    "Of the same model before pruning (dense) and after the last shot (pruned, and retrained), as an evaluation "
    "outside of the run measured it and handed it to the report."
)
SHOTS = "A shot searches on to a part of the sparsity, applies the mask and retrains the model with it."
SEARCHES = "Of the searches of all shots; retraining is not in it."
OF_SHOTS = (
    "Sparsity is what the search was asked for, of the weights or of the budget. Returned are weights that an earlier "
    "shot had removed. The loss of the search is that of its last step, that of retraining the mean of the last tenth "
    "of its steps; empty where a function of your own retrains. What else was measured comes from outside of the run."
)
COSTS = {
    "params": "Of the smaller model, of those of the dense one; tied ones once.",
    "macs": "Multiply-accumulates of one call with the example inputs: convolutions, products of matrices, attention.",
    "bytes": "Of parameters and buffers in memory.",
    "channels": "What may be taken out: channels of convolutions, heads of attention, neurons of Linear layers; those "
    "that are added, concatenated or normalized together count once.",
}
GROUPS = (
    "A group is what one module computes, named by it; they are numbered as in result.structure. The smaller model has "
    "what is kept, and nothing else."
)
LATENCY = (
    "Measured: one call in eval mode without gradients, medians of both models taken by turns. Another machine, or "
    "this one busy with other things, has other times."
)
WAYPOINTS = "Masks that the same run took when it passed these sparsities; each removes exactly its share."
LAYERS = (
    "Tensors are numbered in the model's order. Density is the share of a tensor's weights that is kept; the sparsity "
    "asked for holds for all tensors together, so some keep more and some less."
)
LEFT_ALONE = "Parameters that no mask covers, by the reason why."

_SOFT = (
    "1 minus the soft density of the particles, which falls by the schedule: a size of the particle's numbers, 0 at "
    "the start and near the target at the end. A particle made binary removes that share"
)
_METHODS = {
    "magnitude": "keeps the weights of largest size",
    "snip": "keeps the weights of highest saliency, there |gradient · weight| of the dense model",
    "sfpk": "this package's search",
}  # only methods that go by these very names


def of_picture(name: str, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The words that stand in a picture of this report, and what they mean."""
    many = report["config"].get("n_particles", 1) > 1  # the settings of a baseline name none
    batches = "each particle and step sees a batch of its own" if many else "each step sees another batch"
    if name == "loss.png":
        found = [
            ("mini-batch loss", f"what loss_fn measures on the batches of a step; {batches}, so part of the ups and "
             "downs is chance"),
            ("soft sparsity", _SOFT),
            ("smoothed", "the running median of five steps, for runs of at least as many; the thin line is the loss "
             f"as it was measured{'' if 'shots' in report else '. The knee is looked for on the smoothed curve'}"),
        ]  # fmt: skip
        if report["knee"] is not None:
            found.append(("knee", f"where the smoothed loss turns up, here at {100 * report['knee']:.1f} % removed"))
        if report["waypoints"]:
            when = (
                "after which the model was retrained" if "shots" in report else "at which masks were taken on the way"
            )
            found.append(("mask taken", f"the sparsities {when}"))
        return found
    if name == "particles.png":
        return [
            ("spread", "the root mean square distance of the particles from their mean, as a share of a particle's "
             "own size; 0 where all are the same"),
            ("soft sparsity", _SOFT),
            ("intersection over union (IoU)", "of two binary masks: the weights that both keep, over those that at "
             "least one keeps; 1 for equal masks"),
            ("effective particles", "how many different masks there are, n² / Σ IoU²: 1 where all are alike"),
        ]  # fmt: skip
    if name == "layers.png":
        return [("weights kept", "of each prunable tensor, in the final mask (bars) and in those taken on the way "
                 "(points); the line is the share kept of all together")]  # fmt: skip
    if name == "groups.png":
        return [("kept", "of what each group may lose: its channels, heads or neurons; the line is the share kept of "
                 "all together")]  # fmt: skip
    methods = dict.fromkeys(row["method"] for row in report["baselines"])
    return [(method, _METHODS[method]) for method in methods if method in _METHODS]
