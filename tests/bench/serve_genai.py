"""onnxruntime-genai on the same weights, in an environment of its own: python serve_genai.py <weights> <out>; texts on stdin, figures on stdout.

It has no server. n streams are one batch of n prompts, padded, that nobody joins; its tokens a second are those of the whole batch.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime_genai as og

sys.path.insert(0, str(Path(__file__).parent))
from serve_load import LEVELS, REQUESTS, SYSTEM, TOKENS, chosen  # this environment has nothing else of the repository


def main() -> None:
    weights, out = sys.argv[1:3]
    if not Path(out).exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", weights, "-o", out, "-p", "int8", "-e", "cpu", "-c", f"{out}.cache"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    model = og.Model(out)
    tokenizer, ends = og.Tokenizer(model), {2}
    texts, found = json.load(sys.stdin), {}
    for streams in LEVELS:
        tokens, seconds, firsts, paces, spent = 0, 0.0, [], [], 0.0
        for request in range(REQUESTS[streams]):
            asked = [
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{chosen(texts, streams, number, request)}<|im_end|>\n<|im_start|>assistant\n"
                for number in range(streams)
            ]
            began, used = time.monotonic(), time.process_time()
            prompts = tokenizer.encode_batch(asked)
            length = prompts.shape()[1] if streams > 1 else len(prompts.as_numpy().reshape(-1))
            options = og.GeneratorParams(model)
            options.set_search_options(max_length=length + TOKENS, batch_size=streams, do_sample=False)
            generator = og.Generator(model, options)
            generator.append_tokens(prompts.as_numpy().reshape(streams, -1))
            generator.generate_next_token()
            firsts.append(time.monotonic() - began)
            steps = 1
            while not generator.is_done():
                generator.generate_next_token()
                steps += 1
            seconds += time.monotonic() - began
            spent += time.process_time() - used
            paces.append((time.monotonic() - began - firsts[-1]) / max(1, steps - 1))
            for i in range(streams):
                answer = list(generator.get_sequence(i))[length:]
                tokens += next((at for at, token in enumerate(answer) if token in ends), len(answer))
        found[streams] = {"tokens": tokens / seconds, "first": sorted(firsts)[len(firsts) // 2], "worst": max(firsts),
                          "pace": sorted(paces)[len(paces) // 2], "work": tokens / spent}  # fmt: skip
    print(json.dumps(found))


main()
