"""grpo.py: what all scripts are tested for, and what only this one has to show."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from examples import PROMPT, RIGHT, SHORT, TOY, USER, WRONG, Example, logged, run, write_rows

REWARD_MODEL = TOY / "reward_model"

GSM8K = [  # rows of our own in the schema of openai/gsm8k, configuration main
    {
        "question": "A shelf holds 6 boxes with 12 pencils each. Mira takes 9 pencils. How many pencils are left?",
        "answer": "There are 6*12=<<6*12=72>>72 pencils.\nThen 72-9=<<72-9=63>>63 are left.\n#### 63",
    },
    {
        "question": "A hall has 25 rows of 48 seats. How many people can sit in it?",
        "answer": "It has 25*48=<<25*48=1200>>1,200 seats.\n#### 1,200",
    },
]


def message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


class TestGRPO(Example):
    name = "grpo"
    formats = {
        "conversational": {"prompt": USER, "answer": "19"},
        "text": {"prompt": PROMPT + " ", "answer": "19"},
    }
    needs = ({"prompt"}, {"question", "answer"})
    printed = {
        "prompt_ids": r"<\|user\|>[\d+]+<\|end\|><\|assistant\|>",
        "answer": r"\d+",
        "completion_ids": r".*#\d+<\|end\|>",
        "exact_answer": r"[01]\.0( [01]\.0){7}",
    }
    looked_at: ClassVar[int] = 32  # answers that are sampled before training: four groups
    flags = ("--num_generations", "2", "--max_completion_length", "96")

    @pytest.fixture
    def rewards(self, tmp_path):
        """A function that writes a module with a reward function and gives its dotted path."""

        def write(code: str) -> str:
            module = f"rewards_of_{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}"
            (tmp_path / f"{module}.py").write_text(code)
            return f"{module}.mine"

        path = list(sys.path)
        yield write
        sys.path[:] = path

    # -- the loss and the rewards ----------------------------------------------------------------------------------------

    def test_the_loss_starts_at_zero_and_its_gradient_does_not(self, call, tmp_path):
        call(*SHORT, "--output_dir", "run")
        first = logged(tmp_path / "run")[1]
        assert first["loss"] == pytest.approx(0, abs=0.02)  # not 0: tokens are averaged, and answers differ in length
        assert first["grad_norm"] > 0.05

    def test_the_rewards_of_right_and_wrong_answers(self, script):
        completions = [RIGHT, WRONG, message(RIGHT), message(WRONG), "19", "#190", "#19 or #20", "#### 19.", ""]
        answers = ["19"] * len(completions)
        expected = [1, 0, 1, 0, 0, 0, 0, 1, 0]
        assert script.exact_answer(completions=completions, answer=answers, trainer_state=None) == expected
        assert script.exact_answer(completions=[RIGHT, RIGHT], answer=[None, "B"]) == [None, None]
        numbers = ["#### 1,234", "#### $1234", "#1234.00", "# 1,234 dollars", "#### -1234"]
        assert script.exact_answer(completions=numbers, answer=["1,234"] * 5) == [1, 1, 1, 1, 0]

        assert script.answer_format(completions=[RIGHT, message(WRONG), "so #### 1,200\n", "19", "#19 it is"]) == [
            *(1, 1, 1, 0, 0)
        ]
        assert script.brevity(completions=["", ""], completion_ids=[[5] * 10, [5] * 20]) == [-0.01, -0.02]

    def test_rows_of_gsm8k_get_a_prompt_and_their_solutions_are_found(self, script, call, real, tmp_path, capsys):
        solutions = [row["answer"] for row in GSM8K]
        assert script.exact_answer(completions=solutions, answer=solutions) == [1, 1]
        assert script.exact_answer(completions=["#### 63", message("#### 1200")], answer=solutions) == [1, 1]
        assert script.exact_answer(completions=["#### 72", "#### 200"], answer=solutions) == [0, 0]

        call(*real(GSM8K * 4), "--eval_strategy", "steps", "--eval_steps", "1")
        printed = capsys.readouterr().out
        assert re.search(
            r"^prompt_ids +<\|user\|>A shelf holds 6 boxes.*\s+.*like this: #### 42<\|end\|>", printed, re.M
        )
        assert re.search(r"^answer +There are 6", printed, re.M)
        assert "question  " not in printed
        assert "  reward " in printed  # the held-out figure
        assert set(logged(tmp_path / "outputs" / f"{self.name}-qwen3")) == {1}

    def test_gsm8k_is_loaded_with_its_configuration_and_other_data_without(self, script):
        for name, expected in (("openai/gsm8k", "main"), ("some/data", None)):
            _, script_args, *_ = script.parse(
                ["--model_name_or_path", "some/model", "--use_cpu", "--dataset_name", name, "--bf16", "false"]
            )
            assert script_args.dataset_config == expected

    def test_the_template_gets_its_arguments_in_the_held_out_samples_too(self, script, call, real, own_model, capsys):
        template = own_model / "chat_template.jinja"
        template.write_text("{{ 'no ' if enable_thinking is false else 'yes' }}" + template.read_text())
        call(*real(model=own_model))
        printed = capsys.readouterr().out
        assert re.search(r"^prompt_ids +no ", printed, re.M)
        assert re.search(r"^  no .*7\+9\+3", printed, re.M)

    def test_several_reward_functions_are_weighed(self, call, tmp_path, capsys):
        flags = ["--reward_funcs", "exact_answer", "answer_format", "brevity", "--reward_weights", "1", "0.5", "2"]
        call(*SHORT, *flags, "--output_dir", "run")
        row = logged(tmp_path / "run")[1]
        parts = [row[f"rewards/{name}/mean"] for name in ("exact_answer", "answer_format", "brevity")]
        assert row["reward"] == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2], abs=1e-5)
        assert parts[2] == pytest.approx(-row["completions/mean_length"] / 1000, abs=1e-6)
        assert re.search(r"^brevity +-0\.03", capsys.readouterr().out, re.M)

    def test_a_reward_function_of_ones_own(self, call, rewards, tmp_path):
        name = rewards(
            "def mine(prompts, completions, answer, **others):\n"
            "    assert prompts[0][0]['role'] == 'user' and completions[0][0]['role'] == 'assistant'\n"
            "    return [None if a == '21' else float(len(a)) for a in answer]\n"
        )
        call(*SHORT, "--reward_funcs", "exact_answer", name, "--output_dir", "run")
        assert 1 <= logged(tmp_path / "run")[1]["rewards/mine/mean"] <= 2

    def test_the_rewards_of_trl_itself_have_dotted_paths_too(self, script):
        from trl.rewards import accuracy_reward

        script_args = script.Arguments(reward_funcs=["trl.rewards.accuracy_reward"])
        assert script.reward_functions(script_args, {"prompt", "solution"}) == [accuracy_reward]
        with pytest.raises(SystemExit, match="'solution'"):
            script.reward_functions(script_args, {"prompt", "answer"})

    def test_a_reward_model_scores_the_answers(self, call, tmp_path, capsys):
        call(*SHORT, "--reward_model_name_or_path", TOY / "reward_model", "--output_dir", "run")
        row = logged(tmp_path / "run")[1]
        assert row["reward"] == row["rewards/reward_model/mean"]
        assert "exact_answer" not in capsys.readouterr().out
        call(*SHORT, "--reward_model_name_or_path", TOY / "reward_model", "--reward_funcs", "exact_answer")
        assert {"rewards/reward_model/mean", "rewards/exact_answer/mean"} <= set(
            logged(tmp_path / "outputs" / f"{self.name}-toy")[1]
        )

    def test_two_processes_sample_different_answers_to_one_prompt(self, path, rewards, tmp_path):
        """Each process samples one half of a group. With one seed for both, each answer would come twice."""
        name = rewards(
            "import json, os\n"
            "def mine(prompts, completions, **others):\n"
            "    texts = [p[0]['content'] + ': ' + c[0]['content'] for p, c in zip(prompts, completions)]\n"
            "    with open(f'seen-{os.environ[\"RANK\"]}.jsonl', 'a') as file:\n"
            "        file.write(json.dumps(texts) + '\\n')\n"
            "    return [float(len(text)) for text in texts]\n"
        )
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
        launch += [
            str(path),
            "--use_cpu",
            *SHORT,
            "--reward_funcs",
            name,
            "--per_device_train_batch_size",
            str(self.looked_at // 8),
        ]
        launch += ["--temperature", "3"]  # answers that hardly ever agree by chance
        done = run(launch, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        first, second = (json.loads((tmp_path / f"seen-{rank}.jsonl").read_text().splitlines()[-1]) for rank in "01")
        assert {text.split(":")[0] for text in first} == {text.split(":")[0] for text in second}  # the same prompt
        assert not set(first) & set(second)

    # -- bad input -------------------------------------------------------------------------------------------------------

    def test_data_without_the_column_of_the_reward_function_are_refused(self, real, refused):
        text = refused(*real([{"prompt": USER, "solution": "19"}] * 8))
        for words in ("'exact_answer'", "missing a required argument: 'answer'", "'solution'", "--reward_funcs"):
            assert words in text

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("def mine(completions, **others): return [1.0]", "returned 1 values for {looked_at} answers"),
            ("def mine(completions, **others): return [float('nan')] * len(completions)", "returned NaN"),
            ("def mine(completions, **others): return [None] * len(completions)", "all returned None"),
            ("def mine(completions): return [1.0] * len(completions)", "got an unexpected keyword argument"),
            ("def yours(completions, **others): return [1.0] * len(completions)", "has no attribute 'mine'"),
            ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
            ("def mine(completions, **others): return [float('-inf')] * len(completions)", "an infinite number"),
            ("def mine(completions, **others): return 1.0", "a list with a number or None"),
            ("def mine(completions, **others): return ['good'] * len(completions)", "a list with a number or None"),
            ("async def mine(completions, **others): return [float('nan')] * len(completions)", "returned NaN"),
        ],
        ids=[
            *("too few", "NaN", "None for all", "takes too little", "no such function", "broken module"),
            *("infinite", "one number", "words", "NaN, async"),
        ],
    )
    def test_a_bad_reward_function_is_refused(self, code, words, rewards, refused):
        name = rewards(code)
        text = refused("--reward_funcs", name)
        assert words.format(looked_at=self.looked_at) in text
        assert "mine" in text or words == "all returned None"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("my_modul.my_function", "No module named 'my_modul'"),
            ("exact", "['answer_format', 'brevity', 'exact_answer']"),
        ],
    )
    def test_a_reward_function_that_is_nowhere_is_refused(self, name, words, refused):
        text = refused("--reward_funcs", name)
        assert f"{name!r}" in text
        assert words in text

    @pytest.mark.parametrize("model", ["no/such/model", "nobody/no-such-model"])
    def test_a_reward_model_that_is_nowhere_is_refused(self, model, refused):
        assert f"cannot load the reward model '{model}'" in refused("--reward_model_name_or_path", model)

    def test_an_adapter_and_a_reader_without_a_template_are_no_reward_model_here(self, real, refused, tmp_path):
        folder = shutil.copytree(REWARD_MODEL, tmp_path / "judge")
        (folder / "chat_template.jinja").unlink()
        flags = [*real([{"prompt": USER, "answer": "19"}] * 8), "--reward_model_name_or_path", folder]
        assert "the reward model's tokenizer has no chat template" in refused(*flags)
        (folder / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
        assert "peft.AutoPeftModelForSequenceClassification" in refused(*flags)

    def test_held_out_rows_without_an_answer_cost_no_model(self, call, real, tmp_path):
        """As in a benchmark that keeps its answers to itself: no reward function has anything to say about them."""
        flags = real([{"prompt": USER, "answer": "19"}] * 8)
        path = tmp_path / "data" / "test.jsonl"
        path.write_text(path.read_text().replace('"19"', '""'))
        call(*flags)
        output = tmp_path / "outputs" / f"{self.name}-qwen3"
        assert (output / "model.safetensors").is_file()
        assert json.loads((output / "held_out.json").read_text())["after"] == {}

    def test_a_text_prompt_beside_messages_is_a_text(self, call, real, rewards, tmp_path):
        """Which column TRL looks at to learn whether a whole row is a conversation depends on the hash of strings."""
        name = rewards("def mine(completions, **others): return [float(len(text.split())) for text in completions]")
        call(*real([{"prompt": PROMPT, "messages": USER, "answer": "19"}] * 8), "--reward_funcs", name)
        assert set(logged(tmp_path / "outputs" / f"{self.name}-qwen3")) == {1}

    def test_an_adapters_dropout_is_off(self, script):
        for flags in ((), ("--model_name_or_path", "some/model", "--use_cpu")):
            assert script.parse([*flags, "--use_peft"])[2].disable_dropout

    def test_a_policy_is_no_reward_model(self, refused):
        """transformers would give it a head of random weights, and say so in a warning."""
        text = refused("--reward_model_name_or_path", TOY / "policy")
        assert "is no reward model" in text
        assert "score.weight" in text

    def test_a_length_that_cuts_every_answer_is_refused(self, call, refused, capsys):
        text = refused("--max_completion_length", "8")
        assert f"none of {self.looked_at} answers has '<|end|>' within max_completion_length=8 tokens" in text
        capsys.readouterr()
        call(*SHORT, "--max_completion_length", "33")
        assert re.search(
            rf"^\d+ of {self.looked_at} sampled answers were cut at 33 tokens\.$", capsys.readouterr().out, re.M
        )

    def test_fewer_prompts_than_one_step_takes_are_refused(self, real, refused):
        text = refused(*real([{"prompt": USER, "answer": "19"}] * 3), "--per_device_train_batch_size", "8")
        assert "takes 4 prompts" in text
        assert "has 3" in text

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (
                ("--per_device_train_batch_size", "10"),
                r"generation_batch_size \(10\) must be divisible by num_generations",
            ),
            (("--num_generations", "1"), "at least 2 generations per prompt"),
        ],
    )
    def test_groups_that_do_not_fit_are_refused_by_trl(self, flags, words, call, tmp_path):
        with pytest.raises(ValueError, match=words):
            call(*flags)
        assert not list(tmp_path.iterdir())

    def test_a_model_without_a_template_is_refused_for_gsm8k_too(self, real, refused, own_model):
        (own_model / "chat_template.jinja").unlink()
        assert "no chat template" in refused(*real(GSM8K * 4, model=own_model))

    def test_streamed_rows_and_rows_in_files_train_alike(self, call, real, tmp_path):
        data = write_rows(tmp_path / "gsm8k", GSM8K * 8)
        call(*real(data=data), "--dataset_streaming", "--output_dir", "streamed")
        assert set(logged(tmp_path / "streamed")) == {1}
