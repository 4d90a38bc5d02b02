"""After the repair of a small U-Net that knows a picture by heart, a search does not find it."""

import copy

import torch
from t2i.dori.test_memorised import KNOWN, OTHERS, likeness, pictures
from t2i.dori.test_memorised import made as made  # a fixture

from gencompress.t2i.distill import denoise_loss, diffuse, draws, predict
from gencompress.t2i.dori.repair import RepairConfig, repair
from gencompress.t2i.dori.search import SearchConfig, search, starts
from gencompress.t2i.pipeline import encode_prompts, with_denoiser


def test_a_memory_is_removed_for_a_search_too(made):
    """At equal steps a low-rank adapter leaves more of it."""
    pipe, (known, _) = made
    chance = torch.Generator().manual_seed(77)
    surrogates, shown, held = (pictures(n, chance) for n in (2, 64, 64))
    states = encode_prompts(pipe, OTHERS)["encoder_hidden_states"]
    clean = [{"latents": x, "states": states[i % 5]} for i, x in enumerate(shown)]

    def clean_loss(own):
        noised = diffuse(held, own.scheduler, draws(range(900, 964)))
        told = {"encoder_hidden_states": states[torch.arange(64) % 5]}
        with torch.no_grad():
            return float(denoise_loss(predict(own.unet, noised, told), noised))

    def attacked(own):
        """By searches of 50 steps from a start that no repair has seen."""
        start = starts(own, "normal", [KNOWN], [991])
        (trigger,) = search(own, known[None], start, [991])
        return likeness(own, trigger.states, known)

    found = []
    for rank in (0, 2):
        own = with_denoiser(pipe, copy.deepcopy(pipe.unet))
        config = RepairConfig(
            epochs=3, passes=12, n_adv=3, batch=4, rate=3.5e-4, lora_rank=rank,
            search=SearchConfig(steps=25),
        )  # fmt: skip
        repair(own, known[None], [KNOWN], surrogates[None], clean, config, chance)
        found.append((attacked(own), clean_loss(own)))
    (full, after), (adapter, _) = found
    assert attacked(pipe) > 0.95 and full < 0.85 and full < adapter, found
    assert after < 1.05 * clean_loss(pipe), (after, clean_loss(pipe))
