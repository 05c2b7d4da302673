"""Prune an MLP on real digits, step by step: what is prunable, the run, the mask file, the pruned model."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import Coordinates, MaskSet, SFPKConfig, SFPKPruner, baselines
from sfpk_kernels.demo.task import load_digits


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    loader = digits.loader(seed=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    # A dry run: what would be pruned, what is left alone and why. The output layer stays dense here.
    ignored = ["5"]
    print(Coordinates(model, ignored_layers=ignored).describe(), "\n")

    # Any loss will do: a function of the model and a batch.
    def smoothed(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.1)

    config = SFPKConfig(0.95, n_steps=300)
    pruner = SFPKPruner(model, loss_fn=smoothed, config=config, ignored_layers=ignored)
    result = pruner.run(loader)
    print(result.mask)
    print("density by layer:", {name: round(share, 3) for name, share in result.mask.layer_densities().items()})

    def accuracy() -> float:
        return float((model(digits.test_x).argmax(1) == digits.test_y).float().mean())

    print(f"dense      {accuracy():.3f}")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    baselines.magnitude(model, config.sparsity, ignored_layers=ignored).apply_(model)
    print(f"magnitude  {accuracy():.3f}")
    model.load_state_dict(dense)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        result.mask.save(path)
        MaskSet.load(path).apply_(model)
    print(f"sfpk       {accuracy():.3f}")


if __name__ == "__main__":
    main()
