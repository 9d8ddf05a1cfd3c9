"""Requests in parts: how methods that store contexts are held to the common tests, on the kv family's model."""

from typing import Any

import torch

SIZES = {"prefix": 5, "first": 12, "second": 9, "third": 15, "question": 7}


def parts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(1, 61, (size,), generator=generator) for name, size in SIZES.items()}


@torch.no_grad()
def run(handle: Any) -> tuple[torch.Tensor, ...]:
    """Scores of the token after a question behind contexts in three orders, then two rows of tokens, both padded."""
    text, settings = parts(), {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    stores = hasattr(handle.host, "shelf")
    if stores:
        handle.host.shelf.clear()
    question, scores = text["question"][None], []
    for order in (["first", "second", "third"], ["third", "first"], ["second", "third", "first"]):
        contexts = [text[name] for name in order]
        if stores:
            out = handle.generate(question, contexts=contexts, prefix=text["prefix"], **settings)
        else:
            ids = torch.cat([text["prefix"], *contexts, text["question"]])[None]
            out = handle.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        scores.append(out.scores[0])
    lists = [[text["first"], text["second"]], [text["third"], text["second"]]]
    questions, mask = question.repeat(2, 1), torch.ones(2, SIZES["question"], dtype=torch.int64)
    questions[1, :2] = mask[1, :2] = 0
    if stores:
        written = handle.generate(questions, attention_mask=mask, contexts=lists, max_new_tokens=4, do_sample=False)
    else:
        joined = [torch.cat(one) for one in lists]
        lead = len(joined[1]) - len(joined[0])
        ids = torch.stack([torch.cat([joined[0].new_zeros(lead), joined[0]]), joined[1]])
        seen = torch.ones_like(ids)
        seen[0, :lead] = 0
        ids, mask = torch.cat([ids, questions], 1), torch.cat([seen, mask], 1)
        written = handle.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return torch.stack(scores), written[:, -4:]
