"""The equations in float64, one row, one head and one expert at a time.

Written from the paper and the description of the checkpoints, not from the library: it shares no
function with it. Weights go by the library's names because they are the library's weights.
Shapes: L length, H width, D head width, R rank.
"""

import math
from collections.abc import Mapping

import torch

Weights = Mapping[str, torch.Tensor]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() for name, value in model.state_dict().items()}


def rms_norm(x, weight, epsilon):
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


def rotate(x, theta, width):
    """Rotate the first `width` columns of x [L, D] by its positions, halves paired."""
    length, half = len(x), width // 2
    out = x.clone()
    for pair in range(half):
        angle = torch.arange(length, dtype=torch.float64) * theta ** (-2 * pair / width)
        first, second = x[:, pair], x[:, pair + half]
        out[:, pair] = first * angle.cos() - second * angle.sin()
        out[:, pair + half] = second * angle.cos() + first * angle.sin()
    return out


class PlainModel:
    """The network of one row, with that row's fast weights."""

    def __init__(self, model) -> None:
        self.weights = weights_of(model)
        self.config = model.config
        self.is_grouped = model.config.model_type == "llada2_moe"
        self.predicts_next = model.config.model_type == "Dream"

    def linear(self, x, weight, name, fast, scale, expert=None):
        y = x @ weight.T

        def pick(factor):
            tensor = fast[f"{name}.{factor}"]
            return tensor if expert is None else tensor[expert]

        if f"{name}.A" in fast:
            y = y + scale * (x @ pick("A").T) @ pick("B").T
        elif f"{name}.delta" in fast:
            y = y + x @ pick("delta").T
        return y

    def attention(self, x, layer, fast, scale):
        config, weights = self.config, self.weights
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size // heads
        rotary = int(width * (getattr(config, "partial_rotary_factor", None) or 1))
        path = f"model.{layer}.self_attn"

        def project(name, value):
            weight = weights[f"{path}.{name}.weight"]
            y = self.linear(value, weight, f"{layer}.self_attn.{name}", fast, scale)
            return y + weights.get(f"{path}.{name}.bias", 0)

        if f"{path}.query_key_value.weight" in weights:
            q, k, v = project("query_key_value", x).split(
                [heads * width, kv_heads * width, kv_heads * width], dim=-1
            )
            norms, output = ("query_layernorm", "key_layernorm"), "dense"
        else:
            q, k, v = project("q_proj", x), project("k_proj", x), project("v_proj", x)
            norms, output = ("q_norm", "k_norm"), "o_proj"
        mixed = []
        for head in range(heads):
            group = head * kv_heads // heads
            query = q[:, head * width : (head + 1) * width]
            key = k[:, group * width : (group + 1) * width]
            value = v[:, group * width : (group + 1) * width]
            if f"{path}.{norms[0]}.weight" in weights:
                query = rms_norm(query, weights[f"{path}.{norms[0]}.weight"], config.rms_norm_eps)
                key = rms_norm(key, weights[f"{path}.{norms[1]}.weight"], config.rms_norm_eps)
            query = rotate(query, config.rope_theta, rotary)
            key = rotate(key, config.rope_theta, rotary)
            scores = (query @ key.T / math.sqrt(width)).exp()
            mixed.append(scores / scores.sum(dim=-1, keepdim=True) @ value)
        return project(output, torch.cat(mixed, dim=-1))

    def dense(self, x, path, fast, scale):
        def project(name, value):
            weight = self.weights[f"model.{path}.{name}_proj.weight"]
            return self.linear(value, weight, f"{path}.{name}_proj", fast, scale)

        return project("down", silu(project("gate", x)) * project("up", x))

    def route(self, token, layer):
        """Return the chosen experts of one token and the weight of each."""
        config, path = self.config, f"model.{layer}.mlp.gate"
        scores, top_k = self.weights[f"{path}.weight"] @ token, config.num_experts_per_tok
        if not self.is_grouped:
            scores = scores.exp() / scores.exp().sum()
            return [(e, scores[e]) for e in scores.argsort(descending=True)[:top_k].tolist()]
        scores = 1 / (1 + (-scores).exp())
        ranking = (scores + self.weights[f"{path}.expert_bias"]).tolist()
        size = config.num_experts // config.n_group
        groups = [range(size * g, size * (g + 1)) for g in range(config.n_group)]
        groups.sort(key=lambda group: -sum(sorted(ranking[e] for e in group)[-2:]))
        allowed = [e for group in groups[: config.topk_group] for e in group]
        chosen = sorted(allowed, key=lambda e: -ranking[e])[:top_k]
        total = sum(scores[e] for e in chosen)
        return [(e, config.routed_scaling_factor * scores[e] / total) for e in chosen]

    def experts(self, x, layer, fast, scale):
        weights, path = self.weights, f"{layer}.mlp.experts"
        both = weights[f"model.{path}.gate_up_proj"]
        half = both.shape[1] // 2
        out = []
        for token in x:  # one token after the other
            total = torch.zeros_like(token)
            for expert, share in self.route(token, layer):
                args = (fast, scale, expert)
                one = token[None]
                gate = self.linear(one, both[expert, :half], f"{path}.gate_proj", *args)
                up = self.linear(one, both[expert, half:], f"{path}.up_proj", *args)
                down = weights[f"model.{path}.down_proj"][expert]
                inner = silu(gate) * up
                total = total + share * self.linear(
                    inner, down, f"{path}.down_proj", *args
                ).squeeze(0)
            out.append(total)
        return torch.stack(out)

    def feed_forward(self, x, layer, fast, scale):
        if f"model.{layer}.mlp.experts.down_proj" not in self.weights:
            return self.dense(x, f"{layer}.mlp", fast, scale)
        y = self.experts(x, layer, fast, scale)
        shared = f"{layer}.mlp.shared_experts"
        if f"model.{shared}.down_proj.weight" in self.weights:
            y = y + self.dense(x, shared, fast, scale)
        return y

    def hidden(self, ids, fast=None, scale=1.0):
        """Return the last hidden states [L, H] before the final norm."""
        fast, epsilon = fast or {}, self.config.rms_norm_eps
        x = self.weights["model.embed_tokens.weight"][ids]
        for index in range(self.config.num_hidden_layers):
            layer = f"layers.{index}"
            norm = self.weights[f"model.{layer}.input_layernorm.weight"]
            x = x + self.attention(rms_norm(x, norm, epsilon), layer, fast, scale)
            norm = self.weights[f"model.{layer}.post_attention_layernorm.weight"]
            x = x + self.feed_forward(rms_norm(x, norm, epsilon), layer, fast, scale)
        return x

    def normed(self, ids, fast=None, scale=1.0):
        """Return the states [L, H] from which each position is predicted, after the norm."""
        norm = self.weights["model.norm.weight"]
        states = rms_norm(self.hidden(ids, fast, scale), norm, self.config.rms_norm_eps)
        return torch.cat([states[:1], states[:-1]]) if self.predicts_next else states

    def log_probabilities(self, ids, fast=None, scale=1.0):
        logits = self.normed(ids, fast, scale) @ self.weights["lm_head.weight"].T
        return logits - logits.exp().sum(dim=-1, keepdim=True).log()


def token_loss(model, loss, source, target, clean, position, fast, scale, cache):
    """Return the inner loss of one position of one row; the teacher is constant."""
    if "student" not in cache:
        with torch.no_grad():
            cache["teacher"] = model.log_probabilities(target, fast, scale)
            cache["teacher_normed"] = model.normed(target, fast, scale)
        cache["student"] = model.log_probabilities(source, fast, scale)
        cache["student_normed"] = model.normed(source, fast, scale)
    p, q = cache["teacher"][position], cache["student"][position]
    theirs, ours = cache["teacher_normed"][position], cache["student_normed"][position]
    if loss == "cross_entropy":
        return -q[clean[position]]
    if loss == "kl":
        return sum(p[v].exp() * (p[v] - q[v]) for v in range(len(p)))
    if loss == "reverse_kl":
        return sum(q[v].exp() * (q[v] - p[v]) for v in range(len(p)))
    if loss == "hidden_mse":
        return (ours - theirs).square().sum() / len(ours)
    return 1 - ours @ theirs / (ours.square().sum().sqrt() * theirs.square().sum().sqrt())


def clip(grads: Mapping[str, torch.Tensor], limit: float | None, scope: str):
    """Clip every matrix on its own (every expert's too), or all of one memory jointly."""
    if limit is None:
        return dict(grads)
    if scope == "global":
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        factor = limit / (norm + 1e-12) if norm > limit else 1.0
        return {name: grad * factor for name, grad in grads.items()}
    clipped = {}
    for name, grad in grads.items():
        matrices = grad.reshape(-1, *grad.shape[-2:]).clone()
        for matrix in matrices:
            norm = float(matrix.square().sum().sqrt())
            if norm > limit:
                matrix *= limit / (norm + 1e-12)
        clipped[name] = matrices.view_as(grad)
    return clipped


def inner_loop(model, start, scale, steps, memory, num_epochs=1):
    """Run one memory's inner loop over its rows.

    Args:
        model: A `PlainModel`.
        start: phi_0 of this memory.
        scale: alpha / rank.
        steps: Per inner step a list of rows (source, target, clean, supervised positions, weight),
            the weight already divided by its normaliser.
        memory: `MemoryConfig`: loss, learning rate, clipping.
        num_epochs: Passes over `steps`.

    Returns:
        phi_K, the loss of every step, and the gradients of every step before clipping.
    """
    fast, losses, history = {k: v.double() for k, v in start.items()}, [], []
    for rows in list(steps) * num_epochs:
        fast = {name: tensor.detach().requires_grad_() for name, tensor in fast.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for source, target, clean, positions, weight in rows:
            cache: dict[str, torch.Tensor] = {}
            for position in positions:
                loss = loss + weight * token_loss(
                    model, memory.loss, source, target, clean, position, fast, scale, cache
                )
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(fast.values()), materialize_grads=True)
        else:
            grads = [torch.zeros_like(tensor) for tensor in fast.values()]
        grads = dict(zip(fast, grads, strict=True))
        losses.append(float(loss.detach()))
        history.append(grads)
        clipped = clip(grads, memory.clip_norm, memory.clip_scope)
        fast = {
            name: tensor.detach() - memory.learning_rate * clipped[name]
            for name, tensor in fast.items()
        }
    return fast, losses, history
