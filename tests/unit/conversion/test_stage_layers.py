"""Layers of each pipeline stage: even, uneven, by layout, and layouts that do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.config.schema import ParallelConfig
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.errors import InputError
from gdpo_megatron.platform import detect_platform


def parallel(stages: int, layout: str | None = None) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages, pipeline_model_parallel_layout=layout
    )


@pytest.mark.parametrize(
    ("num_layers", "stages", "expected"),
    [(8, 4, [2, 2, 2, 2]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (5, 4, [2, 1, 1, 1]), (3, 1, [3])],
)
def test_spread(num_layers: int, stages: int, expected: list[int]) -> None:
    assert stage_layers(num_layers, parallel(stages)) == expected


@given(st.integers(1, 8), st.integers(0, 40))
def test_spread_is_even(stages: int, more: int) -> None:
    layers = stage_layers(stages + more, parallel(stages))
    assert len(layers) == stages and sum(layers) == stages + more
    assert layers == sorted(layers, reverse=True) and layers[0] - layers[-1] <= 1


LAYOUTS = [
    ("Ettt|ttL", 5, [3, 2]),
    ("Et*3|t*2L", 5, [3, 2]),
    ("E t, t | t t t L", 5, [2, 3]),
    ("E(tt|)*2tL", 5, [2, 2, 1]),
    ("Et|(t|)*2ttL", 5, [1, 1, 1, 2]),
    ("EtttL", 3, [3]),
]


@pytest.mark.parametrize(("layout", "num_layers", "expected"), LAYOUTS)
def test_layout(layout: str, num_layers: int, expected: list[int]) -> None:
    assert stage_layers(num_layers, parallel(len(expected), layout)) == expected


@pytest.mark.filterwarnings("ignore")  # Megatron's, of packages that are absent
@pytest.mark.parametrize(("layout", "num_layers", "expected"), LAYOUTS)
def test_layout_means_the_same_to_megatron(
    layout: str, num_layers: int, expected: list[int]
) -> None:
    detect_platform().prepare_megatron()
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    # Spaces are ours.
    theirs = PipelineParallelLayerLayout.from_str(layout.replace(" ", ""), len(expected))
    counts = [stage[0].count(LayerType.decoder) for stage in theirs.layout]
    assert counts == expected


@pytest.mark.parametrize(
    ("num_layers", "stages", "layout", "message"),
    [
        (3, 4, None, "parallel.pipeline_model_parallel_size is 4, but the model has only 3 layers"),
        (5, 2, "Ettt|tL", "has 2 stages and 4 layers, but there are 2 stages and 5 layers"),
        (5, 3, "Ettt|ttL", "has 2 stages and 5 layers, but there are 3 stages and 5 layers"),
        (5, 2, "ttt|ttL", "'ttt|ttL' is not E, then t and |, then L"),
        (5, 2, "Ettt|tt", "'Ettt|tt' is not E, then t and |, then L"),
        (5, 2, "EtLt|ttt", "is not E, then t and |, then L"),
        (5, 2, "Ettt|mtL", "is not E, then t and |, then L"),
        (5, 2, "", "'' is not E, then t and |, then L"),
    ],
)
def test_refused(num_layers: int, stages: int, layout: str | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        stage_layers(num_layers, parallel(stages, layout))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "parallel.pipeline_model_parallel_" in str(caught.value)
