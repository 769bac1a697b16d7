"""A kind of modality that is no picture: sound, from .wav files to tokens, figures and a picture (README's guide)."""

import wave

import numpy as np
import pytest
import torch
import yaml
from scipy.signal import stft

from fourm.cli import read
from fourm.data.shards import ShardDataset
from fourm.evaluation.metrics import COMBINE, CONSTANT, SCORES
from fourm.evaluation.tokenizers import evaluate_tokenizer, reconstruct
from fourm.generation.decode import picture
from fourm.tokenization import load_tokenizer
from fourm.tokenization.inputs import KINDS, InputConfig
from fourm.verbs import tokenizer as verb

RATE, SAMPLES = 8000, 4096
SOUND = InputConfig("spectrogram", (32, 32), rate=RATE, window=512, hop=128)


def tones(count, seed=0):
    """Waves (count, samples) int16: each steps through four notes."""
    rng = np.random.default_rng(seed)
    notes = rng.choice([220.0, 330.0, 440.0, 660.0, 880.0, 1320.0, 1760.0, 2640.0], (count, 4)).repeat(SAMPLES // 4, 1)
    return np.round(12_000 * np.sin(2 * np.pi * np.cumsum(notes, 1) / RATE)).astype(np.int16)


def write_wav(path, samples, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def test_wav_files_are_read(tmp_path):
    mono, stereo = tones(2)
    write_wav(tmp_path / "train" / "sound" / "a.wav", mono)
    write_wav(tmp_path / "train" / "sound" / "b.wav", np.stack([stereo, np.zeros_like(stereo)], axis=1))
    data = ShardDataset(tmp_path / "train")
    np.testing.assert_array_equal(data[0]["sound"], mono)
    np.testing.assert_array_equal(data[1]["sound"], np.round(stereo / 2).astype(np.int16))
    with wave.open(str(tmp_path / "train" / "sound" / "c.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(3)
        file.setframerate(RATE)
        file.writeframes(bytes(30))
    with pytest.raises(ValueError, match="24 bits"):
        ShardDataset(tmp_path / "train")[2]


def test_a_full_scale_tone_stands_in_its_band_at_its_loudness():
    time = np.arange(SAMPLES) / RATE
    seen = KINDS["spectrogram"].to_network(np.sin(2 * np.pi * 1000 * time)[None].astype(np.float32), SOUND)
    assert seen.shape == (1, 1, 32, 32)
    band = int(seen[0, 0, :, 16].argmax())
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 1400), 34) / 2595) - 1)
    assert edges[band] < 1000 < edges[band + 2]
    assert seen[0, 0, band, 16] == pytest.approx(1, abs=0.1)  # within 4 dB of full scale
    silence = KINDS["spectrogram"].to_network(np.zeros((1, SAMPLES), np.int16), SOUND)
    assert (silence == -1).all()
    with pytest.raises(ValueError, match="4096"):
        KINDS["spectrogram"].to_network(np.zeros((1, 100), np.int16), SOUND)


def test_waves_come_back_from_their_spectrogram():
    raw = tones(3)
    seen = KINDS["spectrogram"].to_network(raw, SOUND)
    waves = KINDS["spectrogram"].from_network(seen, SOUND)
    assert waves.shape == raw.shape and waves.dtype == np.float32
    for wave_, wanted in zip(waves, raw, strict=True):  # scipy hears the same pitches
        f, _, made = stft(wave_, RATE, nperseg=512)
        _, _, true = stft(wanted.astype(float), RATE, nperseg=512)
        off = np.abs(f[np.abs(made).argmax(0)] - f[np.abs(true).argmax(0)])
        assert np.median(off) < 80  # the width of a band
    score = SCORES["spectrogram"]
    assert score(raw, raw, None, 0)["spectral_error_db"] == 0
    silence = np.broadcast_to(CONSTANT["spectrogram"](raw.ravel()), raw.shape)
    assert score(waves, raw, None, 0)["spectral_error_db"] < score(silence, raw, None, 0)["spectral_error_db"]
    assert np.abs(COMBINE["spectrogram"](np.stack([waves, -waves]))).max() > 0.1  # the mean would be silence


def test_tokenizer_of_sound(tmp_path):
    for split, count in (("train", 64), ("test", 8)):
        for number, wave_ in enumerate(tones(count, seed=count)):
            write_wav(tmp_path / "data" / split / "sound" / f"{number:03d}.wav", wave_)
    config = {
        "data": str(tmp_path / "data"), "modality": "sound", "folder": str(tmp_path / "sound"), "steps": 120,
        "batch_size": 16, "precision": "fp32", "eval_every": 120, "save_every": 120,
        "optim": {"lr": 5e-3, "warmup": 10},
        "tokenizer": {
            "input": {"kind": "spectrogram", "size": [32, 32], "rate": RATE, "window": 512, "hop": 128},
            "quantizer": {"type": "vq", "codebook_size": 64, "dim": 16, "dead_code": 0.5},
            "backbone": {"patch_size": 8, "width": 48, "encoder": "mlp", "encoder_depth": 1, "decoder": "mlp",
                         "decoder_depth": 1},
            "loss": "mse",
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    torch.manual_seed(0)
    verb.run(read(verb.Config, ["--config", str(path)], "tokenizer"))
    tokenizer = load_tokenizer(tmp_path / "sound")
    test = ShardDataset(tmp_path / "data" / "test")
    truth = np.stack([sample["sound"] for sample in test])
    _, ids = reconstruct(tokenizer, truth)
    assert ids.shape == (8, 16)

    look = KINDS["spectrogram"].to_network
    with torch.no_grad():
        rebuilt, *_ = tokenizer(look(truth, SOUND))
    train = np.stack([sample["sound"] for sample in ShardDataset(tmp_path / "data" / "train")])
    mean = look(train, SOUND).mean(0)
    error, of_mean = ((each - look(truth, SOUND)).abs().mean() for each in (rebuilt, mean))
    assert error < 0.7 * of_mean
    assert evaluate_tokenizer(tokenizer, test, "sound")["spectral_error_db"] > 0

    drawn = picture(tokenizer, truth[0], 96)
    assert drawn.size == (96, 96)
    pixels = np.asarray(drawn).sum(-1, dtype=int)
    assert pixels.max() > 300 and pixels.min() < 30  # tones in silence
    lowest = picture(
        tokenizer, np.round(12_000 * np.sin(2 * np.pi * 220 * np.arange(SAMPLES) / RATE)).astype(np.int16), 96
    )
    assert np.asarray(lowest).sum((1, 2)).argmax() > 80  # low notes are below
