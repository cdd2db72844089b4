"""The model that a training begins with."""

from typing import Any

import pytest

from kdcache.errors import ModelError
from kdcache.training import make_config
from kdcache.training.run.beginning import begin_model


@pytest.mark.parametrize(
    ("verb", "sources", "distils"),
    [
        ("train-teacher", {"data": "photos"}, False),
        ("train-student", {"data": "photos"}, False),
        ("train-student", {"cache": "photos.zarr"}, True),
    ],
)
def test_a_backbone_is_advised_to_learn_features_only_from_a_cache(
    verb: str, sources: dict[str, Any], distils: bool
) -> None:
    config = make_config(verb=verb, model="timm:resnet18", method="none", **sources)
    with pytest.raises(ModelError, match="Nothing to learn: timm:resnet18") as raised:
        begin_model(config, 3, ("segmentation",))
    assert ("--method" in str(raised.value)) == distils
    assert "--model smp:unet-tu-resnet18" in raised.value.fix
