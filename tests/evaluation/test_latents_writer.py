"""``predict`` writes the latents: every observation once, in order, whatever the number of processes."""

import csv
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from functools import wraps
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_vae import VAE, evaluate, score
from lightning_vae.datamodules import Digits, TensorLoader
from lightning_vae.evaluation.latents_writer import LatentsWriter
from lightning_vae.main import main

ROOT = Path(__file__).parents[2]
DIGITS = ["--config", str(ROOT / "configs" / "digits.yaml"), "--trainer.enable_progress_bar=false"]

pytestmark = [pytest.mark.filterwarnings("ignore:FreeBits"), pytest.mark.filterwarnings("ignore:CollapseDetector")]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        main(["fit", *DIGITS, "--trainer.max_epochs=1", "--model.latent_dim=3", "--trainer.enable_model_summary=false"])
    return folder / "logs" / "digits" / "version_0" / "checkpoints" / "last.ckpt"


def read(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def latents(rows):
    return torch.tensor([[float(row[f"z{number}"]) for number in range(3)] for row in rows])


def exact(checkpoint):
    vae = VAE.load_from_checkpoint(checkpoint, weights_only=True).eval()
    data = Digits()
    data.setup("predict")
    test = data._splits["test"]
    with torch.no_grad():
        return vae.encode(vae.observe(test["x"])).mean, test["label"]


def means(rows, *names):
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in names}


def trainer(*callbacks):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **off)


def test_the_command_line_writes_a_table_and_says_where(checkpoint, capsys, monkeypatch):
    kept = []
    predict = Trainer.predict
    keeping = wraps(predict)(lambda *args, **options: kept.append(predict(*args, **options)))
    monkeypatch.setattr(Trainer, "predict", keeping)
    main(["predict", *DIGITS, f"--ckpt_path={checkpoint}", "--model.latent_dim=3"])
    assert "Latents:    logs/digits/version_0/latents.csv" in capsys.readouterr().out
    assert kept == [None]  # Lightning has gathered nothing
    rows = read(Path("logs/digits/version_0/latents.csv"))
    assert list(rows[0]) == ["index", "label", "elbo", "rate", "distortion", "z0", "z1", "z2"]
    posterior_means, labels = exact(checkpoint)
    assert [int(row["index"]) for row in rows] == list(range(297))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    torch.testing.assert_close(latents(rows), posterior_means)
    assert {path.name for path in Path("logs/digits/version_0").iterdir() if "part" in path.name} == set()


def test_the_scores_in_the_table_are_on_average_what_test_prints(checkpoint, capsys, caplog):
    options = [*DIGITS, f"--ckpt_path={checkpoint}", "--model.latent_dim=3"]
    Path("scores.csv").write_text("an earlier table")
    main(["predict", *options, "--latents.path=scores.csv", "--latents.importance_samples=7", "--data.batch_size=50"])
    assert "`--latents.path`: scores.csv is there already, and is overwritten." in caplog.text
    rows = read(Path("scores.csv"))
    names = ["elbo", "rate", "distortion", "nll", "effective_sample_size"]
    assert list(rows[0])[1:7] == ["label", *names]
    main(["test", *options, "--evaluation.importance_samples=7"])
    printed = json.loads(Path("logs/digits/version_1/evaluation.json").read_text())
    assert means(rows, *names) == pytest.approx({name: printed[name] for name in names}, abs=1e-6)
    assert f"{-means(rows, 'elbo')['elbo']:.2f}" in capsys.readouterr().out.replace("-", "")


def test_options_of_a_writer_that_is_there_already_are_refused(checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["predict", *DIGITS, f"--ckpt_path={checkpoint}", "--model.latent_dim=3", "--latents.path=a.csv",
              "--trainer.callbacks+=LatentsWriter"])  # fmt: skip
    assert "the callbacks have a LatentsWriter already" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "1.5"])
def test_a_number_of_samples_that_is_none_ends_in_one_message(checkpoint, capsys, number):
    with pytest.raises(SystemExit):
        main(["predict", *DIGITS, f"--ckpt_path={checkpoint}", "--model.latent_dim=3",
              f"--latents.importance_samples={number}"])  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("\n") <= 3
    assert "importance_samples" in said


@pytest.mark.exhaustive
def test_two_processes_write_one_table_in_order(checkpoint, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "predict", *DIGITS, "--data.batch_size=50", "--model.latent_dim=3",
         f"--ckpt_path={checkpoint}", "--trainer.devices=2", "--trainer.strategy=ddp",
         "--latents.importance_samples=3"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Latents: ") == 1
    folder = tmp_path / "logs" / "digits" / "version_0"
    rows = read(folder / "latents.csv")
    assert [int(row["index"]) for row in rows] == list(range(297))
    torch.testing.assert_close(latents(rows), exact(checkpoint)[0])
    data = Digits()
    data.setup("test")
    alone = evaluate(VAE.load_from_checkpoint(checkpoint, weights_only=True), data.test_dataloader(), 3).to_dict()
    names = ("elbo", "rate", "distortion", "nll", "effective_sample_size")
    assert means(rows, *names) == pytest.approx({name: alone[name] for name in names}, abs=1e-5)  # of float32 networks
    assert not list(folder.glob(".*"))


def test_a_path_that_ends_in_gz_is_compressed(checkpoint, tmp_path):
    vae = VAE.load_from_checkpoint(checkpoint, weights_only=True)
    path = tmp_path / "deep" / "latents.csv.gz"
    trainer(LatentsWriter(str(path))).predict(vae, datamodule=Digits(), return_predictions=False)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert len(read(path)) == 297


class Predicts(LightningModule):
    """Returns what it is given, as anybody's module might."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.output(batch)


def loader(rows, batch_size=4):
    return torch.utils.data.DataLoader(torch.arange(float(rows)), batch_size)  # type: ignore[arg-type]


def test_names_as_ids_no_labels_and_doubles_are_kept_exactly(tmp_path):
    def output(batch):
        return {"mean": batch[:, None].double() / 3, "index": [f"a,{value:.0f}" for value in batch.tolist()]}

    trainer(LatentsWriter("out.csv")).predict(Predicts(output), loader(6), return_predictions=False)
    rows = read(Path("out.csv"))
    assert list(rows[0]) == ["index", "z0"]
    assert [row["index"] for row in rows] == [f"a,{number}" for number in range(6)]
    assert [float(row["z0"]) for row in rows] == [number / 3 for number in range(6)]


def test_batches_without_an_index_are_scored_with_the_noise_of_their_place(tmp_path):
    torch.manual_seed(0)
    vae, x = VAE((2,), latent_dim=1).double(), torch.randn(7, 2)
    batches = torch.utils.data.DataLoader(list(x), batch_size=3)  # type: ignore[arg-type, var-annotated]
    run = trainer(LatentsWriter("out.csv", importance_samples=4))
    for _ in range(2):  # each run counts from zero
        run.predict(vae, batches, return_predictions=False)
        rows = read(Path("out.csv"))
        for name, values in score(vae, vae.observe(x), 4).items():
            assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), rel=1e-12), name


def test_a_step_of_ones_own_has_no_scores_and_they_can_not_be_asked_for(tmp_path):
    class Own(VAE):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return {"mean": batch.repeat(2, 1), "index": torch.arange(2 * len(batch))}

    vae, batches = Own((2,), latent_dim=1), torch.utils.data.DataLoader(torch.randn(4, 2))  # type: ignore[arg-type, var-annotated]
    with pytest.raises(MisconfigurationException, match=r"`importance_samples` needs .* `predict_step`, got Own"):
        trainer(LatentsWriter("out.csv", importance_samples=4)).predict(vae, batches)
    trainer(LatentsWriter("out.csv")).predict(vae, batches, return_predictions=False)
    assert list(read(Path("out.csv"))[0]) == ["index", "z0", "z1"]


def test_memory_does_not_grow_with_the_data(tmp_path):
    def output(batch):
        return {"mean": batch["x"][:, None].expand(-1, 8), "index": batch["index"]}

    def peak(rows):
        tracemalloc.start()
        # Of a torch DataLoader Lightning itself keeps every index that `predict` has seen.
        batches = TensorLoader({"x": torch.arange(float(rows))}, batch_size=500)
        trainer(LatentsWriter("out.csv")).predict(Predicts(output), batches, return_predictions=False)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(1000)  # what is imported on the way
    assert peak(20_000) < 1.5 * peak(2000)  # the file grows tenfold


def test_a_file_that_was_not_finished_does_not_appear(tmp_path):
    def output(batch):
        if batch[0] > 0:
            raise RuntimeError("broken")
        return {"mean": batch[:, None], "index": batch.long()}

    with pytest.raises(RuntimeError, match="broken"):
        trainer(LatentsWriter("out.csv")).predict(Predicts(output), loader(8), return_predictions=False)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("output", "loaders", "message"),
    [
        (lambda batch: batch, 1, "'mean', 'index'"),
        (lambda batch: {"mean": batch[:, None], "index": batch}, 2, "of one loader"),
    ],
)
def test_what_can_not_be_written_is_an_error(output, loaders, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(LatentsWriter("out.csv")).predict(Predicts(output), [loader(4)] * loaders)


def test_rows_are_named_by_the_data_module(tmp_path):
    """Case `latents_without_names`."""

    class Data(LightningDataModule):
        class_names = ("cat", "dog")

        def file_names(self, stage):
            return [f"{stage}-{number}.png" for number in range(6)]

        def predict_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(6.0), batch_size=4)  # type: ignore[arg-type]

    def output(batch):
        return {"mean": batch[:, None], "index": 5 - batch.long(), "label": batch.long() % 2}

    trainer(LatentsWriter("out.csv")).predict(Predicts(output), datamodule=Data(), return_predictions=False)
    rows = read(Path("out.csv"))
    assert list(rows[0]) == ["index", "label", "file", "class", "z0"]
    assert [row["file"] for row in rows] == [f"predict-{row['index']}.png" for row in rows]
    assert [row["class"] for row in rows] == [("cat", "dog")[int(row["label"])] for row in rows]


@pytest.mark.parametrize(
    ("labels", "written"),
    [(["b", "a, or b", "a"], ["b", "a, or b", "a"]), (torch.tensor([[2], [0], [1]]), ["2", "0", "1"])],
)
def test_labels_beside_the_observations_are_written_as_they_are(labels, written, tmp_path):
    data = list(zip(torch.randn(3, 2), labels, strict=True))
    batches = torch.utils.data.DataLoader(data, batch_size=2)  # type: ignore[arg-type, var-annotated]
    trainer(LatentsWriter("out.csv")).predict(VAE((2,), latent_dim=1), batches, return_predictions=False)
    rows = read(Path("out.csv"))
    assert list(rows[0]) == ["index", "label", "elbo", "rate", "distortion", "z0"]
    assert [row["label"] for row in rows] == written
