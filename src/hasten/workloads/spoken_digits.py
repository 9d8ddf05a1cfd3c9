"""spoken-digits: strings of digits, heard and spelled out: an encoder-decoder whose inputs and outputs vary in length.

An example is one to eight digits, few more often than many, each a clip of sound; the clips' log-mel features [frames,
24] are joined, and the model writes the words, `two six ...`. Clips are

    data=made   two tones a digit as on a telephone, 40 to 500 ms long, with noise: made on the spot (the default)
    data=fsdd   people who say the digits: fsdd/recordings_0_19.zip of the folder HASTEN_DATA, of which recordings 0 to
                4 of each digit and speaker are held out

Strings of both parts are put together anew from the clips of their part. The baseline takes batches at random and pads
each to its longest example, so that more than half of what is computed is padding; padding is masked, and an example
has the same loss in whatever batch it is. `rows` stands for what a memory takes in the worst case, a batch of examples
as long as the longest. Of rates from 0.002 to 0.006, 0.002 came to the lowest loss in 260 steps of 16 rows.
"""

import dataclasses
import functools
import io
import math
import pathlib
import wave
import zipfile

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads.base import Supervised
from hasten.workloads.data_folder import data_file

RATE, WINDOW, HOP, BANDS = 8000, 256, 128, 24
FILE = "fsdd/recordings_0_19.zip"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " efghinorstuvwxz"
END, PAD = len(LETTERS), -100
TONES = [(941, 1336), *((low, high) for low in (697, 770, 852) for high in (1209, 1336, 1477))]
MOST, HELD_OUT = 8, 192


class Strings(torch.utils.data.Dataset):
    """Examples (features [frames, 24], letters [letters], which end with END).

    Attributes:
        lengths: [examples, 2] frames and letters.
    """

    def __init__(self, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.examples = examples
        self.lengths = torch.tensor([[len(features), len(letters)] for features, letters in examples])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.examples[place]


class Speller(nn.Module):
    """Two strided convolutions and a GRU over the sound; a GRU over the letters, which attends to the sound."""

    def __init__(self, width: int = 64, heads: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(BANDS, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.listen = nn.GRU(width, width, batch_first=True)
        self.embed = nn.Embedding(END + 1, width)
        self.write = nn.GRU(width, width, batch_first=True)
        self.attend = nn.TransformerDecoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.heard, self.norm, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, END + 1)

    def forward(self, features: torch.Tensor, frames: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        """Scores of each next letter.

        Args:
            features: [batch, frames, 24], zeros after an example's end. frames: [batch], how many are real.
            letters: [batch, letters] ids of what is written, padded with anything.

        Returns:
            [batch, letters, 17]; row t is of the letter t, given those before it.
        """
        x = torch.relu(self.conv1(features.mT))
        frames = (frames + 1) // 2
        x = x * (torch.arange(x.shape[2], device=x.device) < frames[:, None])[:, None]
        x = torch.relu(self.conv2(x)).mT
        frames = (frames + 1) // 2
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]
        x = self.heard(x + self.listen(x)[0])
        before = torch.cat([letters.new_full((len(letters), 1), END), letters[:, :-1].clamp(min=0)], 1)
        y = self.embed(before)
        y = y + self.write(y)[0]
        later = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device).triu(1)
        y = self.attend(y, x, tgt_mask=later, memory_key_padding_mask=padding)
        return self.head(self.norm(y))


@dataclasses.dataclass(frozen=True)
class SpokenDigits(Supervised):
    data: str = option("made", "tones made on the spot, or people's recordings", choices=("made", "fsdd"))
    rows: int = option(6, "examples of a training batch", least=1, most=1024)
    examples: int = option(4000, "training examples", least=16, most=100_000)
    steps: int = option(300, "steps of the baseline's schedule", least=10)
    lr: float = option(2e-3, "peak learning rate of the baseline's AdamW", above=0)
    target: float = option(0.47, "held-out cross-entropy in nats a letter at which training stops", above=0)

    tunable = {"lr": (5e-4, 2e-2), "warmup": (0.02, 0.5)}
    evaluate_every = 20

    @classmethod
    def title(cls) -> str:
        return "spoken-digits"

    def build(self, seed: int) -> nn.Module:
        return self.seeded(seed, Speller)

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        together = functools.partial(collate, device=self.device())
        return self.shuffled(seed, strings(self.data, False, self.examples), collate_fn=together)

    def losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = model(**batch)
        letters = batch["letters"]
        each = nn.functional.cross_entropy(scores.mT, letters, ignore_index=PAD, reduction="none")
        return each.sum(1) / (letters != PAD).sum(1)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        data = strings(self.data, True, HELD_OUT)
        order = data.lengths[:, 0].argsort().split(32)  # of about one length: little padding
        found = torch.empty(len(data))
        for places in order:
            batch = collate([data[place] for place in places.tolist()], self.device())
            found[places] = self.losses(model, batch).float().cpu()
        return found.double().numpy()


def collate(examples: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs of `Speller.forward`, padded to the batch's longest example: zeros, and PAD among the letters."""
    features, letters = zip(*examples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return {
        "features": pad(list(features), batch_first=True).to(device),
        "frames": torch.tensor([len(one) for one in features], device=device),
        "letters": pad(list(letters), batch_first=True, padding_value=PAD).to(device),
    }


@functools.lru_cache(maxsize=4)
def strings(data: str, held_out: bool, count: int) -> Strings:
    """`count` strings of digits, the same ones always."""
    clips = _made(held_out) if data == "made" else _recorded(data_file(FILE), held_out)
    rng = np.random.default_rng(11 + held_out)
    examples = []
    for _ in range(count):
        number = min(MOST, rng.geometric(0.3))
        digits = rng.integers(0, 10, number)
        features = torch.cat([clips[digit][rng.integers(len(clips[digit]))] for digit in digits])
        spelled = " ".join(WORDS[digit] for digit in digits)
        examples.append((features, torch.tensor([*map(LETTERS.index, spelled), END])))
    return Strings(examples)


@functools.cache
def _bands() -> torch.Tensor:
    """Triangles of equal width on the mel scale, [129 frequencies, 24]."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)
    at = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((at - low) / (middle - low), (high - at) / (high - middle)).clamp(min=0)


def log_mel(sound: torch.Tensor) -> torch.Tensor:
    """Features of sound [samples] at 8 kHz between -1 and 1: [1 + samples // 128, 24], about 0 and of size 1."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True, pad_mode="constant")
    return ((spectrum.abs().square().T @ _bands()).clamp(min=1e-5).log() + 4) / 4


@functools.cache
def _made(held_out: bool, clips: int = 40) -> list[list[torch.Tensor]]:
    """Features of each digit's clips of two tones."""
    rng = np.random.default_rng(101 + held_out)
    found: list[list[torch.Tensor]] = []
    for tones in TONES:
        mine = []
        for _ in range(clips):
            seconds = 0.04 * math.exp(rng.uniform(0, math.log(12.5)))
            time = np.arange(int(RATE * seconds)) / RATE
            wanted = sum(np.sin(2 * np.pi * (tone * rng.uniform(0.97, 1.03) * time + rng.uniform())) for tone in tones)
            sound = rng.uniform(0.1, 0.4) * wanted + 0.1 * rng.standard_normal(len(time))
            mine.append(log_mel(torch.from_numpy(sound).float()))
        found.append(mine)
    return found


@functools.lru_cache(maxsize=2)
def _recorded(file: pathlib.Path, held_out: bool) -> list[list[torch.Tensor]]:
    """Features of each digit's recordings of one part.

    Raises:
        UsageError: the file is no such archive, or holds none of some digit.
    """
    found: list[list[torch.Tensor]] = [[] for _ in WORDS]
    try:
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                digit, _, rest = pathlib.PurePosixPath(name).stem.partition("_")
                number = rest.rpartition("_")[2]
                if not name.endswith(".wav") or not (digit.isdigit() and number.isdigit()):
                    continue
                if (int(number) < 5) == held_out:
                    found[int(digit)].append(log_mel(_sound(archive.read(name))))
    except (OSError, zipfile.BadZipFile, wave.Error, EOFError, IndexError) as error:
        raise UsageError(f"{file} can't be read as a zip of recordings DIGIT_SPEAKER_NUMBER.wav: {error}") from None
    if not all(found):
        missing = [word for word, clips in zip(WORDS, found, strict=True) if not clips]
        raise UsageError(f"{file} holds no recording of: {', '.join(missing)}")
    return found


def _sound(content: bytes) -> torch.Tensor:
    """A mono WAV of 16 bits at 8 kHz, [samples], scaled to a loudest sample of 0.5."""
    with wave.open(io.BytesIO(content)) as stored:
        if (stored.getnchannels(), stored.getsampwidth(), stored.getframerate()) != (1, 2, RATE):
            raise wave.Error(f"a recording is not mono, 16 bits, {RATE} Hz")
        samples = np.frombuffer(stored.readframes(stored.getnframes()), "<i2").astype(np.float32)
    return torch.from_numpy(samples * (0.5 / max(1.0, float(np.abs(samples).max()))))


WORKLOAD = SpokenDigits
