"""`lmd train arc`: whose weights move, exact resume, processes, warnings, what a run leaves."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from latents_fake import write_latents

from lmd.__main__ import main
from lmd.arc.card import about, arc_log, costs
from lmd.arc.discriminator import Discriminator, HeadConfig
from lmd.arc.losses import GanLoss, RealFakePair
from lmd.arc.module import (
    ArcTraining,
    draw_dropped,
    draw_scored_levels,
    make_pair,
    make_part,
    plan_update,
)
from lmd.arc.options import ArcRun
from lmd.checkpoint import load_model, read_header, save_checkpoint
from lmd.config import preset
from lmd.errors import LmdError
from lmd.model.live_model import LiveModel
from lmd.model.text import HashTextEncoder
from lmd.rng import normal
from lmd.training.draws import BatchIndices
from lmd.training.trainer import checkpoints, fit
from lmd.training.windows import LatentSource, Windows

HERE = Path(__file__).parent
TINY = preset("tiny")
WORDS = (
    *("--preset", "tiny", "--batch", "4", "--blocks", "1,2", "--steps", "2,3", "--warmup", "4"),
    *("--last-block", "blocks.1", "--r1", "0.1", "--r2", "0.1", "--precision", "32"),
    *("--lr-generator", "1e-3", "--lr-discriminator", "1e-3"),
    *("--accelerator", "cpu", "--no-progress"),
)
HEAD = HeadConfig((8, 8, 12, 16), n_blocks=1)
RUN = ArcRun(
    n_updates=6,
    batch=2,
    lr_generator=1e-3,
    lr_discriminator=1e-3,
    blocks="1",
    steps="2",
    warmup=2,
    last_block="blocks.1",
    r1=0.1,
    r2=0.1,
)


def lively_model(seed: int) -> LiveModel:
    """A tiny model with nothing left at its zero initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LiveModel(TINY.dit)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Latents, a base and a fine-tuned model."""
    folder = write_latents(tmp_path_factory.mktemp("arc"), n_sounds=6)
    for seed, kind in enumerate(("base", "finetuned")):
        weights = lively_model(seed).state_dict()
        save_checkpoint(folder / f"{kind}.safetensors", weights, kind=kind, config=TINY)
        other = lively_model(seed + 2).state_dict()
        save_checkpoint(folder / f"other-{kind}.safetensors", other, kind=kind, config=TINY)
    return folder


def words(data: Path, out: Path, n_updates: int, *more: object) -> list[str]:
    files = ["--data", data, "--init", data / "finetuned.safetensors"]
    files += ["--base", data / "base.safetensors", "--out", out, "--updates", n_updates]
    return [*WORDS, *map(str, files), *map(str, more)]


def start(*arguments: object, kill_at: int | None = None) -> subprocess.Popen:
    """A training process, killed after an update if told so."""
    head = ["-m", "lmd", "train", "arc"] if kill_at is None else [HERE / "arc_worker.py", kill_at]
    return subprocess.Popen(
        [sys.executable, *map(str, [*head, *arguments])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        text, _ = process.communicate(timeout=900)  # on a machine that does much else
    finally:
        process.kill()
    assert process.returncode == code, text
    return text


NUMBERS = ["discriminator/pair", "discriminator/contrastive", "generator/pair", "accuracy"]


def curves(out: Path) -> np.ndarray:
    return arc_log(out)[NUMBERS].to_numpy()


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """Twenty updates in one go."""
    out = tmp_path_factory.mktemp("straight")
    assert main(["train", "arc", *words(data, out, 20, "--checkpoint-every", 10)]) == 0
    return out


# Whose weights move


def module_of(data: Path, run: ArcRun = RUN) -> ArcTraining:
    text = HashTextEncoder(TINY.text.n_tokens, TINY.text.dim)
    judge = Discriminator(lively_model(0), run.last_block, HEAD)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in judge.head.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.2
    return ArcTraining(lively_model(1), judge, text, LatentSource(data, 0), run)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


class Watch:
    """Remembers both networks before every update and compares them after it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, bool, bool]] = []

    def callback(self):
        from lightning.pytorch.callbacks import LambdaCallback

        def before(trainer, module, batch, index):
            self.kept = [state(n) for n in (module.generator, module.discriminator, module.ema)]

        def after(trainer, module, outputs, batch, index):
            plan = plan_update(module.options, module.options.seed, batch[0].rows.step)
            nets = (module.generator, module.discriminator, module.ema)
            still = [same(kept, net) for kept, net in zip(self.kept, nets, strict=True)]
            self.seen.append((plan.trains, *still))
            assert all(p.grad is None for net in nets for p in net.parameters())

        return LambdaCallback(on_train_batch_start=before, on_train_batch_end=after)


def fit_here(data: Path, out: Path, run: ArcRun = RUN, *callbacks: object) -> None:
    where = {"out": out, "precision": "32", "accelerator": "cpu", "no_progress": True}
    fit(module_of(data, replace(run, **where)), callbacks)


def test_each_update_moves_its_own_network_and_leaves_the_other_to_the_bit(data, tmp_path):
    watch = Watch()
    fit_here(data, tmp_path, RUN, watch.callback())
    for trains, generator_still, discriminator_still, average_still in watch.seen:
        assert generator_still == (trains == "discriminator")
        assert average_still == (trains == "discriminator")
        assert discriminator_still == (trains == "generator")
    turns = [seen[0][0] for seen in watch.seen]
    assert turns == list("dddgdg")  # two of warm-up, then in turn


def test_checkpointed_layers_give_the_same_curves(data, tmp_path):
    for name in ("plain", "checkpointed"):
        run = replace(RUN, checkpointing=name == "checkpointed")
        fit_here(data, tmp_path / name, run)
    assert np.array_equal(
        curves(tmp_path / "plain"), curves(tmp_path / "checkpointed"), equal_nan=True
    )


# What an update draws


def test_an_update_is_a_function_of_its_number():
    plans = [plan_update(RUN, 5, k) for k in range(40)]
    assert plans == [plan_update(RUN, 5, k) for k in range(40)]
    assert {plan.block.regime for plan in plans} == {"block-causal", "enc-dec"}
    assert {plan.n_calls for plan in plans} == {(1,), (2,)}


class Numbered:
    """A source in which every row has a prompt of its own."""

    def windows(self, step: int, positions: Sequence[int], n_frames: int) -> Windows:
        prompts = [f"row {p} of {step}" for p in positions]
        return Windows(normal((len(prompts), 8, n_frames), step, "numbered"), prompts, prompts)


def test_rows_are_dealt_other_rows_prompts_however_the_batch_is_split():
    run = replace(RUN, batch=4)
    for update in range(20):
        whole = make_part(run, Numbered(), update, 0, 1)
        parts = [make_part(run, Numbered(), update, shard, 2) for shard in range(2)]
        assert whole.wrong_prompts == [prompt for part in parts for prompt in part.wrong_prompts]
        assert sorted(whole.wrong_prompts) == sorted(whole.prompts)
        assert all(a != b for a, b in zip(whole.prompts, whole.wrong_prompts, strict=True))


def test_a_part_has_its_rows_of_the_whole_batch(data):
    run, source = replace(RUN, batch=4), LatentSource(data, 0)
    whole = make_part(run, source, 3, 0, 1)
    parts = [make_part(run, source, 3, shard, 2) for shard in range(2)]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))


def test_text_is_dropped_at_the_given_rate_once_per_update():
    options = replace(RUN, text_dropout=0.3)
    rows = [BatchIndices(0, step, tuple(range(8)), 8) for step in range(100)]
    drawn = torch.stack([draw_dropped(options, row) for row in rows]).float()
    assert torch.equal(drawn[0], draw_dropped(options, rows[0]).float())
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.08)  # five standard deviations: 0.08


def trial_of(data: Path, run: ArcRun, update: int = 2) -> RealFakePair:
    """What an update of a run sets before the discriminator."""
    module, seen = module_of(data, run), []

    def note(*arguments):
        seen.append(make_pair(*arguments))
        return seen[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmd.arc.module.make_pair", note)
        patch.setattr(module, "manual_backward", lambda loss: None)
        part = make_part(run, module.source, update, 0, 1)
        module.backward_part(part, plan_update(run, run.seed, update))
    return seen[0]


def test_a_row_is_played_and_judged_with_its_prompt_throughout_or_without_it(data):
    """Each row of a rollout is that of a run that drops all, or none: no call drew anew."""
    options = replace(RUN, blocks="3", steps="3", batch=6)
    none, half, everything = (
        trial_of(data, replace(options, text_dropout=rate)) for rate in (0.0, 0.5, 1.0)
    )
    dropped = half.asked.dropped
    assert 0 < dropped.sum() < 6
    assert torch.equal(half.wrong.dropped, dropped)
    assert not none.asked.dropped.any()
    expected = torch.where(dropped[:, None, None], everything.fake, none.fake)
    torch.testing.assert_close(half.fake, expected)
    rows = (everything.fake - none.fake).flatten(1).abs().amax(dim=1)
    assert rows.min() > 1e-3, "a prompt can be heard in every row"


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_rollout_continues_the_context_that_the_real_one_has_dropped_or_not(data, dropout):
    trial = trial_of(data, replace(RUN, from_silence=dropout, context_dropout_part=0))
    s = RUN.context_frames
    assert torch.equal(trial.real[..., :s], trial.fake[..., :s])
    assert bool(trial.real[..., :s].any()) == (dropout == 0)
    assert trial.real.shape == trial.fake.shape == (2, 8, s + 48)
    assert not torch.equal(trial.real[..., s:], trial.fake[..., s:])
    assert not trial.fake.requires_grad  # update 2 is the discriminator's
    assert trial_of(data, RUN, update=3).fake.requires_grad


def test_the_discriminator_looks_at_levels_even_in_log_snr():
    rows = BatchIndices(0, 3, tuple(range(2000)), 2000)
    levels = draw_scored_levels(RUN, rows)
    log_snr = torch.logit(1 - levels.double())
    assert log_snr.min() > -6.001
    assert log_snr.max() < 2.001
    # uniform on -6 ... 2: mean -2, standard error 0.05
    assert log_snr.mean().item() == pytest.approx(-2, abs=0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "0"}, "--blocks '0'; expected whole numbers from 1"),
        ({"block_frames": "6"}, "1 blocks of 6 frames; expected a multiple of 4"),
        ({"block_frames": "50"}, "a block of 50 frames"),
    ],
)
def test_rollouts_that_cannot_be_scored_are_refused(change, message):
    with pytest.raises(LmdError, match=message):
        replace(RUN, **change).check()


# Runs


def test_a_killed_run_goes_on_to_the_same_bits(data, straight, tmp_path):
    """20 updates = checkpoint at 10, kill -9 at 13, and the rest."""
    arguments = words(data, tmp_path, 20, "--checkpoint-every", 10)
    finish(start(*arguments, kill_at=13), -9)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step=0000010.ckpt"]
    assert main(["train", "arc", *arguments]) == 0
    assert arc_log(tmp_path)["step"].tolist() == list(range(20))
    assert np.array_equal(curves(tmp_path), curves(straight), equal_nan=True)
    ours, theirs = (read_header(p / "arc.safetensors").sha256 for p in (tmp_path, straight))
    assert ours == theirs
    kept = [
        torch.load(p / "checkpoints/step=0000020.ckpt", weights_only=False)
        for p in (tmp_path, straight)
    ]
    assert {name.split(".")[0] for name in kept[0]["state_dict"]} == {
        "generator",
        "discriminator",
        "ema",
        "n_winning",
    }
    assert len(kept[0]["optimizer_states"]) == 2
    for name, tensor in kept[0]["state_dict"].items():
        assert torch.equal(tensor, kept[1]["state_dict"][name]), name


@pytest.mark.parametrize("which", ["init", "base"])
def test_a_run_does_not_go_on_from_other_weights(data, tmp_path, which, capsys):
    assert main(["train", "arc", *words(data, tmp_path, 2, "--warmup", 0)]) == 0
    name = {"init": "finetuned", "base": "base"}[which]
    more = ["--warmup", 0, f"--{which}", data / f"other-{name}.safetensors"]
    assert main(["train", "arc", *words(data, tmp_path, 4, *more)]) == 2
    assert f"other options ({which}_from" in capsys.readouterr().err
    kept = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    assert kept[f"{which}_from"] == read_header(data / f"{name}.safetensors").sha256


@pytest.mark.parametrize(("n_devices", "n_parts"), [(2, 1), (1, 2), (2, 2)])
def test_a_split_batch_has_the_curves_of_a_whole_one(data, straight, tmp_path, n_devices, n_parts):
    """Among processes, or into parts one after the other, or both: but for the order of sums."""
    arguments = words(data, tmp_path, 8, "--devices", n_devices, "--accumulate", n_parts)
    if n_devices > 1:
        finish(start(*arguments))
    else:
        assert main(["train", "arc", *arguments]) == 0
    one, both = curves(straight)[:8], curves(tmp_path)
    assert np.array_equal(np.isnan(one), np.isnan(both))
    assert np.nanmax(np.abs(both - one)) < 1e-4


def test_a_run_leaves_weights_logs_and_a_card(data, straight):
    header = read_header(straight / "arc.safetensors")
    assert (header.kind, header.notes["steps"], header.stored) == ("arc", 20, "float16")
    model = load_model(straight / "arc.safetensors")
    before = load_model(data / "finetuned.safetensors")
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved)
    card = (straight / "arc.md").read_text(encoding="utf-8")
    assert header.sha256 in card
    assert "| generator | 96 |" in " ".join(card.split())
    assert "plays in 2 or 3 steps, without guidance" in card
    table = costs(arc_log(straight))
    assert set(table["rollout_frames"]) == {48, 96}
    assert (table["seconds"] > 0).all()
    assert (table["memory_gb"] > 0.1).all()
    assert table["updates"].sum() == 20


def test_a_run_with_several_block_lengths_rolls_out_in_all_of_them(data, tmp_path):
    lengths = ["--block-frames", "48,24,12", "--blocks", "2", "--steps", "2"]
    assert main(["train", "arc", *words(data, tmp_path, 12), *lengths]) == 0
    assert set(arc_log(tmp_path)["rollout_frames"]) == {24, 48, 96}
    kept = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    assert kept["block_frames"] == "48,24,12"


def test_a_run_may_play_its_blocks_out_and_begin_from_silence(data, tmp_path):
    how = ["--plays-out", "--from-silence", "0.75", "--blocks", "2", "--steps", "3"]
    assert main(["train", "arc", *words(data, tmp_path, 6), *how]) == 0
    assert set(arc_log(tmp_path)["calls"]) == {2 * 3}  # all of both blocks, whichever learns
    kept = json.loads((tmp_path / "options.json").read_text(encoding="utf-8"))
    assert (kept["plays_out"], kept["from_silence"]) == (True, 0.75)
    card = (tmp_path / "arc.md").read_text(encoding="utf-8")
    (command,) = [line for line in card.splitlines() if line.startswith("| command |")]
    assert " --plays-out " in command
    assert " --from-silence 0.75 " in command


# What stops or warns


def test_a_discriminator_that_has_won_is_reported_with_advice(data, tmp_path):
    run = replace(RUN, n_updates=3, winning_accuracy=-1.0, winning_updates=2)
    with pytest.warns(UserWarning, match=r"2 of its updates.*Lower --lr-discriminator"):
        fit_here(data, tmp_path, run)


@pytest.mark.parametrize(
    ("accuracies", "warns"),
    [
        ([1.0] * 30, True),
        ([0.99] * 40, True),
        ([1.0] * 29, False),
        ([0.975] * 40, False),
        ([*[1.0] * 29, 0.97, *[1.0] * 29], False),
    ],
)
def test_only_thirty_updates_in_a_row_above_98_percent_are_a_victory(data, accuracies, warns):
    """As a run has it unless told otherwise; said once."""
    module = module_of(data, replace(RUN, n_updates=100))
    module.log_dict = lambda *args, **kwargs: None
    plan, nothing = plan_update(RUN, 0, 0), torch.zeros(())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for share in accuracies:
            told_apart = (torch.arange(1000)[None] < 1000 * share).float()
            verdict = GanLoss(*[nothing] * 3, real=told_apart, fake=torch.full((1, 1000), 0.5))
            module.report(plan, [verdict], 1.0)
    assert len(seen) == warns


def test_a_loss_that_is_not_finite_names_update_rows_and_checkpoint(data):
    module = module_of(data)
    module.last_checkpoint = "step=3.ckpt"
    part = make_part(RUN, module.source, 4, 0, 1)
    part.latents[0, 0, 0] = float("nan")
    with pytest.raises(LmdError, match=r"loss of nan at update 4 on \['sound.*step=3.ckpt"):
        module.backward_part(part, plan_update(RUN, RUN.seed, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "8,x"], "--steps '8,x'"),
        (["--regimes", "sideways"], "--regimes 'sideways'"),
        (["--batch", "0"], "--batch 0"),
        (["--batch", "6", "--accumulate", "4"], "a global batch of 6 rows for 4 parts"),
        *(([flag, "-1"], f"{flag} -1") for flag in ("--warmup", "--r1", "--r2", "--contrastive")),
        *(([flag, "0"], f"{flag} 0") for flag in ("--lr-generator", "--lr-discriminator")),
        (["--checkpoint-every", "0"], "--checkpoint-every 0"),
        (["--ema", "1"], "--ema 1"),
        (["--from-silence", "1.5"], "--from-silence 1.5"),
        (["--block-frames", "50"], "a block of 50 frames"),
        (["--last-block", "blocks.9"], "blocks.9"),
        (["--init", "nowhere.safetensors"], "no file nowhere.safetensors"),
        (["--preset", "small"], "latents of 8 channels"),
    ],
)
def test_bad_words_are_refused(data, tmp_path, capsys, change, message):
    arguments = words(data, tmp_path / "run", 2, "--warmup", 0)
    assert main(["train", "arc", *arguments, *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_in_which_the_generator_would_not_learn_is_refused(data, tmp_path, capsys):
    """Behind a warm-up of 4 the first update is the discriminator's, too."""
    for n_updates in (1, 4, 5):
        assert main(["train", "arc", *words(data, tmp_path / "run", n_updates)]) == 2
        assert "6 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    turns = [plan_update(replace(RUN, warmup=4), 0, k).trains for k in range(6)]
    assert turns.index("generator") == 5


@pytest.mark.parametrize(("which", "other"), [("init", "base"), ("base", "finetuned")])
def test_weights_of_the_wrong_kind_are_refused(data, tmp_path, capsys, which, other):
    change = [f"--{which}", data / f"{other}.safetensors"]
    assert main(["train", "arc", *words(data, tmp_path / "run", 6, *change)]) == 2
    assert f"kind '{other}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_complete_run_is_made_longer_from_its_last_update(data, tmp_path):
    arguments = ["--warmup", 0, "--checkpoint-every", 3]
    assert main(["train", "arc", *words(data, tmp_path, 4, *arguments)]) == 0
    assert [path.name for path in checkpoints(tmp_path)][-1] == "step=0000004.ckpt"
    assert main(["train", "arc", *words(data, tmp_path, 6, *arguments)]) == 0
    assert arc_log(tmp_path)["step"].tolist() == list(range(6))
    assert sorted(path.name for path in (tmp_path / "logs").iterdir())[1:] == ["from-0000004"]


@pytest.mark.parametrize(
    ("counts", "regimes", "told"),
    [
        ("8,4,2", "block-causal,enc-dec", "in 8, 4 or 2 steps, without guidance, in the re"),
        ("6", "enc-dec", "plays in 6 steps, without guidance, in the regime enc-dec."),
        ("1", "full,enc-dec", "in 1 step, without guidance, in the regimes full and enc-d"),
    ],
)
def test_a_card_says_which_steps_and_regimes_were_trained(counts, regimes, told):
    assert told in about(replace(RUN, steps=counts, regimes=regimes))


def test_one_row_cannot_be_contrasted(data):
    with pytest.raises(LmdError, match="at least 2 items"):
        make_part(replace(RUN, batch=1), LatentSource(data, 0), 0, 0, 1)


def test_an_update_whose_gradient_is_not_finite_reaches_no_weight(
    data, tmp_path, capsys, monkeypatch
):
    """Its loss is finite; the run stops, and what it has kept is whole."""

    def poison(module, loss, *rest):
        loss.backward()
        if module.trainer.global_step == 2:
            module.discriminator.base.dit.project_in.weight.grad[0, 0] = torch.nan

    monkeypatch.setattr(ArcTraining, "manual_backward", poison)
    assert main(["train", "arc", *words(data, tmp_path, 6, "--checkpoint-every", 1)]) == 2
    assert "gradient of norm nan at step 2" in capsys.readouterr().err
    kept = load_model(tmp_path / "arc.safetensors")
    assert all(torch.isfinite(p).all() for p in kept.parameters())
