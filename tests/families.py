"""The table of families: every test that takes `family` runs over each of its rows.

A new family is a row here, beside its row in `memdlm.backbones.tiny`; the suite in
tests/conformance/backbones then says whether it keeps what the others promise.
"""

from dataclasses import dataclass
from typing import Any

VOCABULARY, PAD, MASK = 61, 59, 60
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What the tests must know of a family to treat all of them alike.

    Attributes:
        sizes: Fields of the config of a four-layer model of a few thousand weights.
        golden: Folders of tests/fixtures/backbones with its official checkpoints and outputs.
        attention: Names of the linear layers of attention.
        router: Names of linear layers that choose experts; empty where the router is none.
        has_experts: Whether some layer has routed experts.
        fixed: Ends of names in the state dict that training must never move.
        trains_pad: Whether the embedding of the padding token is trained.
    """

    sizes: dict[str, Any]
    golden: tuple[str, ...]
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    router: tuple[str, ...] = ()
    has_experts: bool = False
    fixed: tuple[str, ...] = ()
    trains_pad: bool = False

    @property
    def linear(self) -> tuple[str, ...]:
        """Names of the linear layers that an adapter may sit on; stacked experts are none."""
        return (*self.attention, *self.router, *FEED_FORWARD)


_DENSE_LLADA = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 40,
    "init_std": 0.2,
    "max_sequence_length": 64,
}
_OTHERS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_GROUPS = {"moe_intermediate_size": 20, "n_group": 3, "topk_group": 2}

FAMILIES: dict[str, Family] = {
    "llada": Family(_DENSE_LLADA, ("llada",), trains_pad=True),
    "llada_moe": Family(
        {**_OTHERS, **_EXPERTS, "dense_intermediate_size": 40, "expert_intermediate_size": 20},
        ("lladamoe", "lladamoe_variant"),
        router=("gate",),
        has_experts=True,
    ),
    "llada2": Family(
        {**_OTHERS, **_EXPERTS, **_GROUPS, "num_key_value_heads": 2, "intermediate_size": 40},
        ("llada2", "llada2_variant"),
        attention=("query_key_value", "dense"),
        has_experts=True,
        fixed=(".expert_bias",),
    ),
    "dream": Family({**_OTHERS, "num_key_value_heads": 2, "intermediate_size": 40}, ("dream",)),
}
