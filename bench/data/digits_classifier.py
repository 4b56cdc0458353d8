"""Which features describe an 8x8 digit, and which digit is it?

Inception has nothing to say about 8x8 grey images. This small network, trained on the digits' training split alone,
takes its place in the scores: its penultimate layer for distances, its class probabilities for the Inception Score and
the class accuracy. The weights are shipped, and named by their hash.

    python -m bench.data.digits_classifier     trains it again (ten seconds on one core) and prints the new hash
"""

import argparse
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.config import DataConfig
from bench.data.digits import NUM_CLASSES, load_digits
from bench.data.source import hash_file, to_uint8

WEIGHTS_PATH = Path(__file__).with_suffix(".safetensors")
WEIGHTS_SHA256 = "8eb3f7e3763b3c3a8696ed854cb1ceef3f7163ebc71c338e7508543f5e889364"
FEATURE_WIDTH = 64
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
NOISE = 0.1  # standard deviation, of pixels in [-1, 1]


class DigitsClassifier(nn.Module):
    """uint8 (n, 1, 8, 8) -> features (n, 64) and logits (n, 10), both float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_middle = nn.Conv2d(16, 32, 3, padding=1)
        self.conv_down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.penultimate = nn.Linear(32 * 4 * 4, FEATURE_WIDTH)
        self.head = nn.Linear(FEATURE_WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.classify(images.float() / 127.5 - 1.0)

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, for x (n, 1, 8, 8) in [-1, 1]."""
        x = F.silu(self.conv_in(x))  # (n, 16, 8, 8)
        x = F.silu(self.conv_middle(x))  # (n, 32, 8, 8)
        x = F.silu(self.conv_down(x))  # (n, 32, 4, 4)
        features = F.silu(self.penultimate(x.flatten(1)))  # (n, 64)
        return features, self.head(features)


def load_classifier(path: Path = WEIGHTS_PATH, sha256: str = WEIGHTS_SHA256) -> DigitsClassifier:
    """The shipped network, in evaluation mode; ValueError if the file is missing or not the one that was shipped."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: install the package again, or run python -m bench.data.digits_classifier")
    found = hash_file(path)
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, not {sha256}: restore the shipped file, as scores depend on it")
    network = DigitsClassifier()
    network.load_state_dict(safetensors.torch.load_file(path))
    return network.requires_grad_(False).eval()


def train_classifier(seed: int = 0, epochs: int = EPOCHS) -> DigitsClassifier:
    """Train on the training split, shifted by up to one pixel and slightly noised; the same seed gives the same network.

    Noise and weight decay keep it from being certain of what it has not seen: generated images are never quite clean.
    """
    data = load_digits(DataConfig())
    num_images = len(data.train)
    images, labels = data.train.batch(torch.arange(num_images))
    images = to_uint8(images).float() / 127.5 - 1.0  # as it will see generated images
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(seed)
        network = DigitsClassifier()
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = -(-num_images // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps_per_epoch)
    for _ in range(epochs):
        for indices in torch.randperm(num_images, generator=generator).split(BATCH_SIZE):
            x = _shift(images[indices], generator)
            x = x + NOISE * torch.randn(x.shape, generator=generator)
            loss = F.cross_entropy(network.classify(x)[1], labels[indices])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return network.requires_grad_(False).eval()


def accuracy_and_loss(network: DigitsClassifier) -> tuple[float, float]:
    """Share of held-out images that are recognised, and their mean cross entropy in nats."""
    heldout = load_digits(DataConfig()).heldout
    images, labels = heldout.batch(torch.arange(len(heldout)))
    logits = network(to_uint8(images))[1]
    return (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in both directions; half of them not at all. The background is -1."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    count = len(images)
    offsets = torch.randint(0, 3, (count, 2), generator=generator)
    offsets[torch.rand(count, generator=generator) < 0.5] = 1
    rows = offsets[:, 0, None] + torch.arange(8)  # (n, 8)
    columns = offsets[:, 1, None] + torch.arange(8)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits' feature extractor.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS_PATH)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    network = train_classifier(arguments.seed)
    accuracy, loss = accuracy_and_loss(network)
    arguments.output.write_bytes(safetensors.torch.save(network.state_dict()))
    print(f"held-out accuracy {accuracy:.4f}, cross entropy {loss:.4f}")
    print(f"SHA-256 {hash_file(arguments.output)}, for WEIGHTS_SHA256 in this file")


if __name__ == "__main__":
    main()
