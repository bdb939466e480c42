"""vLLM in a process of its own: jobs come as lines of JSON, answers go back the same way.

    python -m tests.vllm.engine '{"model": ..., ...}'       arguments of vllm.LLM

A job has `prompts` (token ids) and arguments of SamplingParams; its answer has `tokens`, `logprobs` (of each token that was
chosen), `cached` (tokens of each prompt that were not computed), and `seconds`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.daemon.harness import readable
from tierd.clock import monotonic_seconds

START_SECONDS_MAX = 240.0
ANSWER_SECONDS_MAX = 120.0


class Engine:
    """The process, seen from a test. As a server has it, vLLM's core is in another process: `apart`."""

    def __init__(self, log: Path, apart: bool = False, **arguments: Any) -> None:
        command = [sys.executable, "-m", "tests.vllm.engine", json.dumps(arguments)]
        environ = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)), "VLLM_LOGGING_LEVEL": "INFO"}
        if arguments.get("tensor_parallel_size", 1) > 1:
            environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # a core for each worker
        self._log = log
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )
        self._answer(START_SECONDS_MAX)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, prompts: list[list[int]], max_tokens: int = 1, **sampling: Any) -> dict[str, Any]:
        """Generate; returns the answer."""
        self.ask(prompts, max_tokens, **sampling)
        return self.answer()

    def ask(self, prompts: list[list[int]], max_tokens: int = 1, **sampling: Any) -> None:
        """Begin to generate."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens, **sampling}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What became of it."""
        return self._answer(ANSWER_SECONDS_MAX)

    def end(self) -> None:
        """End the process as a user would, and make sure of it."""
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.close()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(30)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = monotonic_seconds() + seconds
        while monotonic_seconds() < deadline:
            if readable(self.process.stdout.fileno(), 0.2):
                line = self.process.stdout.readline()
                assert line, f"the engine has ended:\n{self._log.read_text()[-8000:]}"
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        raise AssertionError(f"no answer in {seconds} s:\n{self._log.read_text()[-8000:]}")


def main() -> None:
    """The process."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else vLLM prints goes to the log
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in job.pop("prompts")]
        sampling = SamplingParams(**{"temperature": 0.0, "logprobs": 0, "detokenize": False, "ignore_eos": True, **job})
        began = monotonic_seconds()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answer = {
            "seconds": monotonic_seconds() - began,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [
                [
                    chosen[token].logprob
                    for token, chosen in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                ]
                for output in outputs
            ],
            "cached": [output.num_cached_tokens for output in outputs],
            "reasons": [output.outputs[0].finish_reason for output in outputs],
        }
        print(json.dumps(answer), file=answers)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
