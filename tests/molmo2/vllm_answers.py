"""Ask vLLM the prompts of test_vllm, in the environment that `make test-engines` makes; this project is not in it.

    python vllm_answers.py EXPORT PROMPTS.json ANSWERS.json

A prompt is {"text": ..., "question": ..., "images": [file, ...], "frames": file or null, "sampled": ...}; the files
hold uint8 arrays of NumPy. `sampled` says whether frames are handed over with their times, or left to vLLM as all
frames of a file at 2 per second. An answer is {"prompt": ids, "chat": ids of the same question
asked as a message, "answer": ids, "logprobs": {id: the first token's}}.
"""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

FPS = 2.0


def media(prompt: dict) -> dict:
    """The images or the video of a prompt, as vLLM takes them."""
    if not prompt["frames"]:
        return {"image": [Image.fromarray(np.load(file)) for file in prompt["images"]]} if prompt["images"] else {}
    frames = np.load(prompt["frames"])
    facts = {"fps": FPS, "total_num_frames": len(frames), "do_sample_frames": True}
    if prompt["sampled"]:
        times = (np.arange(len(frames)) / FPS).tolist()
        facts = {"fps": 1.0, "frames_indices": times, "total_num_frames": len(frames), "do_sample_frames": False}
    return {"video": [(frames, facts)]}


def message(prompt: dict) -> dict:
    """The question of a prompt about images, as a message."""
    pictures = [{"type": "image_pil", "image_pil": image} for image in media(prompt).get("image", [])]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": prompt["question"]}]}


def main(export: str, asked: str, answered: str) -> None:
    llm = LLM(
        export,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 3, "video": 1},
        enable_prefix_caching=False,
    )
    with open(asked) as file:
        prompts = json.load(file)
    requests = [{"prompt": prompt["text"], "multi_modal_data": media(prompt)} for prompt in prompts]
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=12, logprobs=5))
    still = [number for number, prompt in enumerate(prompts) if not prompt["frames"]]
    chats = llm.chat([[message(prompts[number])] for number in still], SamplingParams(max_tokens=1))
    chat_ids = {number: list(chat.prompt_token_ids) for number, chat in zip(still, chats, strict=True)}
    answers = [
        {
            "prompt": list(output.prompt_token_ids),
            "chat": chat_ids.get(number),
            "answer": list(output.outputs[0].token_ids),
            "logprobs": {token: value.logprob for token, value in output.outputs[0].logprobs[0].items()},
        }
        for number, output in enumerate(outputs)
    ]
    with open(answered, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
