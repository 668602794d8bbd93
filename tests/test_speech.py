"""The speech task, on tones instead of speech: each digit is a pitch."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

import gradcomp
from gradcomp.errors import ConfigError
from gradcomp.examples.tasks import speech
from gradcomp.integrations.tasks import load, train_batches


def write(
    folder: Path,
    name: str,
    *,
    hertz: float = 440.0,
    seconds: float = 0.3,
    rate: int = 8000,
    channels: int = 1,
    width: int = 2,
) -> Path:
    (folder / "recordings").mkdir(parents=True, exist_ok=True)
    path = folder / "recordings" / name
    samples = (12_000 * torch.sin(2 * math.pi * hertz / rate * torch.arange(int(seconds * rate)))).to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.numpy().tobytes())
    return path


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four digits, two speakers of another length each, eight recordings each, of which five are for the test."""
    folder = tmp_path_factory.mktemp("tones")
    for digit in range(4):
        for index in range(8):
            write(folder, f"{digit}_ann_{index}.wav", hertz=300 * 2**digit + 9 * index)
            write(folder, f"{digit}_bob_{index}.wav", hertz=300 * 2**digit - 9 * index, seconds=1.3)
    return folder


def test_the_split_and_what_features_are(tones: Path) -> None:
    (features, digits), (held_out, answers) = speech.load_speech(tones)
    assert features.shape == (24, 1, speech.BANDS, speech.FRAMES)
    assert held_out.shape == (40, 1, speech.BANDS, speech.FRAMES)
    assert digits.bincount().tolist() == [6] * 4
    assert answers.bincount().tolist() == [10] * 4
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(1), rtol=0, atol=1e-4)
    assert bool(features.isfinite().all() and held_out.isfinite().all())
    again = speech.load_speech(tones)
    assert torch.equal(again[0][0], features)
    assert torch.equal(again[1][1], answers)


@pytest.mark.parametrize("hertz", [250.0, 1000.0, 3500.0])
def test_a_tone_is_in_its_band(tmp_path: Path, hertz: float) -> None:
    sound = torch.zeros(1, speech.SAMPLES)
    found = speech.read_wav(write(tmp_path, "0_ann_0.wav", hertz=hertz))
    assert found.dtype == torch.float32
    assert 0.3 < float(found.abs().max()) < 0.4
    sound[0, : len(found)] = found
    features = speech.log_mel(sound)[0]
    loudest = int(features[:, 3].argmax())
    top = 2595 * math.log10(1 + 4000 / 700)
    middle = 700 * (10 ** (top * (loudest + 1) / (speech.BANDS + 1) / 2595) - 1)
    assert abs(middle - hertz) < 0.1 * hertz + 8000 / speech.WINDOW
    assert torch.equal(features[:, -1], torch.full((speech.BANDS,), math.log(speech.FLOOR)))  # silence after its end


def test_filters_cover_what_lies_between_the_bands() -> None:
    filters = speech.mel_filters()
    assert filters.shape == (speech.BANDS, speech.WINDOW // 2 + 1)
    assert bool((filters >= 0).all() and (filters <= 1).all())
    assert bool((filters.sum(1) > 0).all()), "an empty band"
    assert bool((filters.sum(0)[2:-2] > 0).all())


def test_what_is_not_there_says_where_it_is_had(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"has 0 WAV files.*DIGIT_SPEAKER_INDEX\.wav: https://") as error:
            speech.load_speech(folder)
        assert str(folder / "recordings") in str(error.value)
    write(tmp_path, "3_ann_7.wav")
    with pytest.raises(ConfigError, match="1 WAV files, 0 of them to test"):
        speech.load_speech(tmp_path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rate": 16000}, "1 channels of 16 bits at 16000 Hz; it must be 1 of 16 at 8000"),
        ({"channels": 2}, "2 channels"),
        ({"width": 1}, "1 channels of 8 bits"),
        ({"seconds": 0.0}, "0 bytes of samples"),
    ],
)
def test_other_kinds_of_files_are_refused(tmp_path: Path, options: dict[str, float], complaint: str) -> None:
    path = write(tmp_path, "3_ann_7.wav", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=complaint) as error:
        speech.load_speech(tmp_path)
    assert str(path) in str(error.value)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "3_ann_7.wav")
    whole = path.read_bytes()
    for damaged in (b"", b"RIFF", b"no sound at all" * 9, whole[:20], whole[:43], whole[:-100], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError) as error:
            speech.read_wav(path)
        assert str(path) in str(error.value)
        assert "expected 16-bit mono at 8000 Hz" in str(error.value)
        assert str(error.value).endswith("https://github.com/Jakobovski/free-spoken-digit-dataset")


@pytest.mark.parametrize("name", ["seven_ann_1.wav", "7_ann.wav", "12_ann_1.wav", "7_ann_x.wav", "7_ann_1_1.wav"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    with pytest.raises(ConfigError, match=r"DIGIT_SPEAKER_INDEX\.wav, such as") as error:
        speech.load_speech(tmp_path)
    assert str(path) in str(error.value)


def test_the_task_trains(tones: Path) -> None:
    function = load(speech.__name__)
    with pytest.raises(ConfigError, match="--set data="):
        function.build()

    def rank_main(transport: object) -> list[float]:
        torch.manual_seed(0)
        task = function.build([f"data={tones}"], epochs=4, batch_size=3)
        assert sum(parameter.numel() for parameter in task.model.parameters()) == 2_961_398
        losses = []
        with gradcomp.attach(
            task.optimizer, model=task.model, compressor="threshold:density=0.01", transport=transport
        ) as sync:
            for epoch in range(task.epochs):
                for inputs, targets in train_batches(
                    task.train_data, batch_size=3, rank=sync.rank, world_size=2, seed=0, epoch=epoch
                ):
                    task.optimizer.zero_grad()
                    loss = task.loss(task.model(inputs), targets)
                    loss.backward()
                    task.optimizer.step()
                    losses.append(float(sync.average(loss.detach())))
            sync.check_replicas()
        return losses

    losses, same = run_ranks(2, rank_main)
    assert losses == same
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
