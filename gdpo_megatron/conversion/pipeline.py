"""How many layers each pipeline stage holds, from the config, before any model is built."""

from __future__ import annotations

import re

from gdpo_megatron.config.schema import ParallelConfig
from gdpo_megatron.errors import InputError


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers per stage, first to last; of all virtual stages, where ranks have several.

    Without a layout they are spread as evenly as possible, the longer stages first. The layout is
    Megatron's notation (`PipelineParallelLayerLayout`): E embedding, t layer, L loss, | between
    stages, `t*3` for ttt, `(tt|)*2` for tt|tt|.

    Raises:
        InputError: the layout does not describe this many layers on this many stages.
    """
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages, layout = pp * vp, parallel.pipeline_model_parallel_layout
    by_virtual = f" x virtual_pipeline_model_parallel_size {vp}" if vp > 1 else ""
    if layout is None:
        if num_layers < stages:
            raise InputError(
                f"parallel.pipeline_model_parallel_size is {pp}{by_virtual}, but the model has "
                f"only {num_layers} layers"
            )
        return [num_layers // stages + (s < num_layers % stages) for s in range(stages)]
    text = layout.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda m: m.group(1) * int(m.group(2)), text)
    if not re.fullmatch(r"Et*(\|t*)*L", text):
        raise InputError(
            f"parallel.pipeline_model_parallel_layout: '{layout}' is not E, then t and |, then L; "
            "for example 'Ettt|ttL'"
        )
    layers = [part.count("t") for part in text.split("|")]
    if len(layers) != stages or sum(layers) != num_layers:
        raise InputError(
            f"parallel.pipeline_model_parallel_layout: '{layout}' has {len(layers)} stages and "
            f"{sum(layers)} layers, but there are {stages} stages and {num_layers} layers"
        )
    return layers
