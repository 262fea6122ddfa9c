"""The commands of docs/ALIGNMENT.md from recipe to result, on a tiny model that reads bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
from safetensors.torch import load_file
from train.tiny import environment

from qwen_native import LLM
from qwen_native.nn import Qwen
from qwen_native.token_files import byte_tokenizer_json
from qwen_native.train.cli import COMMANDS, main
from qwen_native.train.config import load_config
from qwen_native.train.dpo import DpoConfig
from qwen_native.train.grpo import GrpoConfig
from qwen_native.train.ppo import PpoConfig
from qwen_native.train.reward import RewardConfig
from qwen_native.train.scalar import ScalarModel
from qwen_native.train.sft import SftConfig

RECIPES = Path(__file__).parents[2] / "recipes"
PAIRS = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(8)]
SUMS = [{"prompt": f"{i}+1", "answer": i + 1} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ok"}]}
    for i in range(8)
]
LORA = ["lora.rank=2", "lora.alpha=4", "lora.dropout=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the base model and the data."""
    folder = tmp_path_factory.mktemp("alignment")
    tiny.model(max_position_embeddings=512).save(folder / "base")
    (folder / "base" / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    for name, records in (("pairs", PAIRS), ("sums", SUMS), ("chats", CHATS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def train(place, command, data, run, *overrides):
    """Run a command of two steps; the folder of the run."""
    arguments = [
        f"model.path={place / 'base'}", "model.precision=fp32", f"data.files={place / data}.jsonl",
        "data.context=256", "optim.learning_rate=1e-3", f"run.folder={place / run}", "run.steps=2",
        "run.batch_size=2", *overrides,
    ]  # fmt: skip
    assert main([command, *arguments]) == 0
    return place / run


SEVERAL = """
import json, sys
import torch.distributed as dist
from qwen_native.train.cli import main
dist.init_process_group("gloo")
for arguments in json.loads(sys.argv[1]):
    main(arguments)
dist.destroy_process_group()
"""


def test_several_processes_follow_one(place, tmp_path):
    """Reward model, DPO and adapters; shares are uneven, so that some processes have nothing."""
    chats = f"data.files={place / 'chats.jsonl'}"
    pairs = [f"data.{name}={place / 'pairs.jsonl'}" for name in ("files", "validation_files")]
    runs = {
        "reward": ["reward", *pairs],
        "reward_bf16": ["reward", *pairs, "model.precision=bf16"],
        "dpo": ["dpo", *pairs],
        "dpo_lora": ["dpo", *pairs, *LORA],
        "sft_lora": ["sft", chats, "data.pack=false", *LORA],
    }

    def arguments(where, name):
        command, *overrides = runs[name]
        return [
            command, f"model.path={place / 'base'}", "model.precision=fp32", "data.context=256",
            "optim.learning_rate=1e-3", "run.steps=4", "run.batch_size=3",
            "run.micro_batch_tokens=1", f"run.folder={where / name}", *overrides,
        ]  # fmt: skip

    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    many, one = tmp_path / "many", tmp_path / "one"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(script), json.dumps([arguments(many, name) for name in runs]),
        ],
        env=environment(), cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in runs:
        assert main(arguments(one, name)) == 0
        # Sums in another order differ in roundings, of 8 bits in bf16, which Adam amplifies.
        tolerance = {"rtol": 2e-2} if name.endswith("bf16") else {"rtol": 1e-4}
        for value in ("loss", "gradient_norm", "validation_loss", "validation_margin"):
            ours, theirs = (tiny.metrics_of(where / name, value) for where in (many, one))
            np.testing.assert_allclose(ours, theirs, err_msg=f"{name} {value}", **tolerance)
        assert len(tiny.metrics_of(one / name, "loss")) == 4
        for file in sorted((one / name / "model").glob("*.safetensors")):
            saved = load_file(many / name / "model" / file.name)
            for key, expected in load_file(file).items():
                assert saved[key].dtype == expected.dtype
                torch.testing.assert_close(saved[key], expected, rtol=2e-2, atol=3e-3)


def test_what_runs_on_one_process_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="reinforcement learning runs on one process, but torchr"):
        train(place, "grpo", "sums", "alone", "reward.verifier=number")


def same_base(first, second):
    assert first.keys() == second.keys()
    return sum(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("quantize", [[], ["lora.quantize=int4"]])
def test_adapters_of_sft_are_merged(place, tmp_path, quantize):
    extra = [*LORA, *quantize, f"data.validation_files={place / 'chats.jsonl'}"]
    run = train(place, "sft", "chats", f"sft{len(quantize)}", *extra)
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == str(place / "base")
    # No chat template: embedding and head are trained, too.
    assert config["modules_to_save"] == ["embed_tokens"]
    merged = tmp_path / "merged"
    assert main(["merge", str(run / "model"), str(place / "base"), str(merged), "--dtype=f32"]) == 0
    base, result = Qwen.load(place / "base"), Qwen.load(merged)
    assert same_base(base.state_dict(), result.state_dict()) == 2 * 7 + 1
    assert LLM(merged, weights="f32").tokenizer is not None


def test_a_reward_model_and_ppo_with_it(place):
    run = train(
        place, "reward", "pairs", "reward", f"data.validation_files={place / 'pairs.jsonl'}"
    )
    assert len(tiny.metrics_of(run, "validation_accuracy")) == 1
    again = train(place, "reward", "pairs", "more", f"model.path={run / 'model'}")
    first, second = (ScalarModel.load(folder / "model").score for folder in (run, again))
    assert 0 < (first - second).abs().max() < 0.1  # it went on from the first one's head
    options = [
        f"reward.model={run / 'model'}", "value_optim.learning_rate=1e-3", "ppo.value_warmup=1",
        "ppo.minibatches=2", "rollout.max_new_tokens=4", "rollout.threads=1",
        "ppo.pretraining_coefficient=0.5", f"ppo.pretraining_shards={place / 'shards'}",
    ]  # fmt: skip
    text = [str(RECIPES / "sft.yaml"), f"--model={place / 'base'}"]
    assert main(["tokenize", str(place / "shards"), *text]) == 0
    run = train(place, "ppo", "sums", "ppo", *options)
    assert ScalarModel.load(run / "critic").score.shape == (48,)
    assert LLM(run / "model", weights="f32").generate("a", max_new_tokens=2)
    assert len(tiny.metrics_of(run, "engine_mean_ratio")) == 2


def test_memory_lean_ppo_and_its_critic_again(place, capsys):
    options = [
        "reward.verifier=number", "value_optim.learning_rate=1e-3", "ppo.value_warmup=1", *LORA,
        "rollout.max_new_tokens=4", "rollout.threads=1", "reward.unfinished=-1",
    ]  # fmt: skip
    run = train(place, "ppo", "sums", "lean", *options)
    assert (run / "model" / "adapter_config.json").exists()
    assert tiny.metrics_of(run, "reward") == [-1, -1]
    again = train(place, "ppo", "sums", "lean2", *options, f"ppo.critic={run / 'critic'}")
    assert (again / "critic" / "score.safetensors").exists()


def test_dpo_and_grpo(place):
    run = train(place, "dpo", "pairs", "dpo", *LORA)
    assert (run / "model" / "adapter_model.safetensors").exists()
    verifier = place / "check.py"
    verifier.write_text("def score(record, text):\n    return record['answer'] + len(text)\n")
    options = [f"reward.verifier={verifier}:score", "rollout.max_new_tokens=4"]
    run = train(place, "grpo", "sums", "grpo", *options, "rollout.n=2", "rollout.threads=1")
    assert min(tiny.metrics_of(run, "reward")) >= 1
    assert Qwen.load(run / "model").config.vocab_size == 320
    with pytest.raises(ValueError, match="has checkpoints; give --resume"):
        train(place, "grpo", "sums", "grpo", *options, "rollout.n=2")


def test_mistakes_are_named(place, tmp_path):
    with pytest.raises(ValueError, match="verifier is 'nothing.py:f', expected 'number' or"):
        train(place, "grpo", "sums", "bad", "reward.verifier=nothing.py:f")
    with pytest.raises(ValueError, match="reward is missing"):
        train(place, "grpo", "sums", "bad")
    with pytest.raises(ValueError, match="run.eval_every is 3, but there are no validation data"):
        train(place, "grpo", "sums", "bad", "reward.verifier=number", "run.eval_every=3")
    with pytest.raises(ValueError, match="minibatches is 5, expected at most the 4 answers"):
        options = ["grpo.minibatches=5", "rollout.max_new_tokens=2", "rollout.n=2"]
        train(place, "grpo", "sums", "worse", "reward.verifier=number", *options)
    with pytest.raises(ValueError, match="model.dropout is 0.1, expected 0"):
        train(place, "grpo", "sums", "bad", "reward.verifier=number", "model.dropout=0.1")
    with pytest.raises(ValueError, match="lora.embeddings is train, but the reference has the sa"):
        train(place, "dpo", "pairs", "bad", *LORA, "lora.embeddings=train")
    with pytest.raises(ValueError, match="quantize is 'int3', expected one of int4, int8"):
        train(place, "sft", "chats", "bad", "lora.quantize=int3")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("reward_7b", RewardConfig), ("reward_demo", RewardConfig), ("ppo_7b", PpoConfig),
        ("ppo_demo_lora", PpoConfig), ("dpo_demo_lora", DpoConfig),
        ("grpo_demo_lora", GrpoConfig), ("sft_demo_lora", SftConfig),
    ],
)  # fmt: skip
def test_recipes_are_valid(name, kind):
    config = load_config(kind, RECIPES / f"{name}.yaml", [])
    if name == "reward_7b":
        assert (config.optim.learning_rate, config.run.batch_size) == (3e-6, 64)
        assert config.optim.schedule == "constant" and config.run.epochs == 1
    if name == "ppo_7b":
        assert (config.optim.learning_rate, config.value_optim.learning_rate) == (1e-6, 5e-6)
        assert (config.rollout.n, config.rollout.top_p) == (2, 0.9)
        options = config.ppo
        assert (options.kl_coefficient, options.value_clip, options.value_warmup) == (
            0.04,
            0.15,
            50,
        )


@pytest.mark.parametrize("command", ["reward", "dpo", "ppo", "grpo", "merge"])
def test_help_has_examples(command, capsys):
    assert command in COMMANDS
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"qwen-native train {command}" in capsys.readouterr().out
