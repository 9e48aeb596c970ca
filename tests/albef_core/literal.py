"""The paper's equations in NumPy, one loop a sum: slow, and written without the code under test.

From ALBEF section 3 and the notes of the recordings. The losses also take complex numbers, so that
`gradient` differentiates them by the complex step, to the last digit.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

NORM_EPS = 1e-12
COMPLEX_STEP = 1e-30


def gradient(function: Callable, at: np.ndarray) -> np.ndarray:
    """Differentiate a real function of one array: Im f(x + ih) / h has no rounding of its own."""
    slopes = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        moved = at.astype(complex)
        moved[place] += 1j * COMPLEX_STEP
        slopes[place] = function(moved).imag / COMPLEX_STEP
    return slopes


def log_softmax(row: Sequence) -> list:
    top = max(np.real(x) for x in row)
    total = sum(np.exp(x - top) for x in row)
    return [x - top - np.log(total) for x in row]


def softmax(row: Sequence) -> list:
    return [np.exp(x) for x in log_softmax(row)]


def similarities(queries: np.ndarray, keys: np.ndarray, temperature) -> np.ndarray:
    """Equation 1's s(I, T) over tau, for every query and key."""
    table = np.zeros((len(queries), len(keys)), np.result_type(queries, keys, temperature))
    for b, query in enumerate(queries):
        for k, key in enumerate(keys):
            table[b, k] = sum(x * y for x, y in zip(query, key, strict=True)) / temperature
    return table


def positives(
    image_ids: np.ndarray, queue_ids: np.ndarray, queue_valid: np.ndarray, *, by_id: bool
) -> np.ndarray:
    """Say for each query which keys of batch and queue show its photograph."""
    key_ids = [*image_ids, *queue_ids]
    written = [*(True for _ in image_ids), *queue_valid]
    table = np.zeros((len(image_ids), len(key_ids)), bool)
    for b, own in enumerate(image_ids):
        for k, other in enumerate(key_ids):
            table[b, k] = (own == other and written[k]) if by_id else b == k
    return table


def itc_targets(
    teacher_similarity: np.ndarray, positive: np.ndarray, valid: np.ndarray, *, alpha: float
) -> np.ndarray:
    """Equation 6's targets: the label shared among the positives, mixed with the teacher."""
    targets = np.zeros(teacher_similarity.shape)
    used = [k for k, is_used in enumerate(valid) if is_used]
    for b, row in enumerate(teacher_similarity):
        num_positives = sum(bool(x) for x in positive[b])
        for k, soft in zip(used, softmax([row[k] for k in used]), strict=True):
            hard = 1 / num_positives if positive[b, k] else 0.0
            targets[b, k] = alpha * soft + (1 - alpha) * hard
    return targets


def itc_loss(similarity: np.ndarray, targets: np.ndarray, valid: np.ndarray):
    """Equations 2 and 6, one direction: the mean of H(targets, softmax(similarity))."""
    total = 0.0
    used = [k for k, is_used in enumerate(valid) if is_used]
    for b, row in enumerate(similarity):
        for k, log_share in zip(used, log_softmax([row[k] for k in used]), strict=True):
            total = total - targets[b, k] * log_share
    return total / len(similarity)


def negative_weights(
    similarity: np.ndarray, same_image: np.ndarray, *, guard_empty: bool
) -> np.ndarray:
    """The in-batch softmax from which hard negatives are drawn; the same image weighs 0."""
    weights = np.zeros(similarity.shape)
    for b, row in enumerate(similarity):
        others = [k for k in range(len(row)) if not same_image[b, k]]
        if not guard_empty:
            plain = softmax(row)
            for k in others:
                weights[b, k] = plain[k]
            continue
        candidates = others or list(range(len(row)))
        for k, share in zip(candidates, softmax([row[k] for k in candidates]), strict=True):
            weights[b, k] = share
    return weights


def itm_loss(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray):
    """Equation 4: two-way cross-entropy, averaged over the rows that count."""
    total, num = 0.0, 0
    for row, label, is_counted in zip(logits, labels, counts, strict=True):
        if is_counted:
            total = total - log_softmax(row)[label]
            num += 1
    return total / num


def mlm_losses(
    logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray, *, alpha: float
) -> tuple:
    """Equations 3 and 7: the mix, then its two parts, each a mean over the masked words."""
    hard, soft = 0.0, 0.0
    for row, teacher_row, label in zip(logits, teacher_logits, labels, strict=True):
        log_shares = log_softmax(row)
        hard = hard - log_shares[label]
        for share, log_share in zip(softmax(teacher_row), log_shares, strict=True):
            soft = soft - share * log_share
    hard, soft = hard / len(labels), soft / len(labels)
    return (1 - alpha) * hard + alpha * soft, hard, soft


def vqa_losses(
    logits: Sequence[np.ndarray],
    teacher_logits: Sequence[np.ndarray],
    answers: Sequence[Sequence[int]],
    *,
    alpha: float,
) -> list:
    """Of each answer: its tokens' cross-entropies and the teacher's, mixed and added up."""
    losses = []
    for rows, teacher_rows, answer in zip(logits, teacher_logits, answers, strict=True):
        loss = 0.0
        for place, token in enumerate(answer[1:]):
            log_shares = log_softmax(rows[place])
            soft = 0.0
            for share, log_share in zip(softmax(teacher_rows[place]), log_shares, strict=True):
                soft = soft - share * log_share
            loss = loss + (1 - alpha) * -log_shares[token] + alpha * soft
        losses.append(loss)
    return losses


def moving_average(teacher: np.ndarray, student: np.ndarray, *, momentum: float) -> np.ndarray:
    """Momentum times the old plus the rest of the new, number by number."""
    moved = np.zeros(teacher.shape)
    for place in np.ndindex(teacher.shape):
        moved[place] = momentum * teacher[place] + (1 - momentum) * student[place]
    return moved


class Ring:
    """A ring written one row at a time."""

    def __init__(self, num_slots: int) -> None:
        self.rows: list = [None] * num_slots
        self.next = 0

    def push(self, rows: Sequence) -> None:
        for row in rows:
            self.rows[self.next] = row
            self.next += 1
            if self.next == len(self.rows):
                self.next = 0


def published_rates(
    num_epochs: int,
    steps_per_epoch: int,
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_epochs: int,
) -> list[float]:
    """Walk through the published training loop and note the rate that each iteration used."""

    def rate(t: int) -> float:
        if t < warmup_epochs:
            return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
        u = t - warmup_epochs
        return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * u / num_epochs))

    current, used = rate(0), []
    for epoch in range(num_epochs):
        if epoch > 0:
            current = rate(epoch + warmup_epochs)
        for iteration in range(steps_per_epoch):
            used.append(current)
            if epoch == 0 and iteration % 100 == 0 and iteration <= 100 * warmup_epochs:
                current = rate(iteration // 100)
    return used


def linear(rows: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(rows: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    normed = [(row - row.mean()) / math.sqrt(row.var() + NORM_EPS) for row in rows]
    return np.stack(normed) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(rows: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))(rows)


def attention(
    tokens: np.ndarray,
    attended: np.ndarray,
    visible: Sequence[bool],
    weights: Mapping[str, np.ndarray],
    name: str,
    *,
    num_heads: int,
) -> np.ndarray:
    """One caption's multi-head attention with BERT's residual and post-norm."""
    query = linear(tokens, weights, f"{name}.query")
    key = linear(attended, weights, f"{name}.key")
    value = linear(attended, weights, f"{name}.value")
    size = query.shape[1] // num_heads
    context = np.zeros(query.shape)
    used = [k for k, is_visible in enumerate(visible) if is_visible]
    for head in range(num_heads):
        own = slice(head * size, (head + 1) * size)
        for i in range(len(tokens)):
            scores = [query[i, own] @ key[k, own] / math.sqrt(size) for k in used]
            for k, share in zip(used, softmax(scores), strict=True):
                context[i, own] += share * value[k, own]
    return layer_norm(tokens + linear(context, weights, f"{name}.output"), weights, f"{name}.norm")


def text_layer(
    tokens: np.ndarray,
    visible: Sequence[bool],
    image_tokens: np.ndarray | None,
    weights: Mapping[str, np.ndarray],
    *,
    num_heads: int,
) -> np.ndarray:
    """One caption through one BERT layer: self-attention, look at the image, MLP."""
    tokens = attention(tokens, tokens, visible, weights, "self_attention", num_heads=num_heads)
    if image_tokens is not None:
        everything = [True] * len(image_tokens)
        tokens = attention(
            tokens, image_tokens, everything, weights, "cross_attention", num_heads=num_heads
        )
    return mlp(tokens, weights)


def mlp(tokens: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    raised = gelu(linear(tokens, weights, "mlp.up"))
    return layer_norm(tokens + linear(raised, weights, "mlp.down"), weights, "mlp.norm")


def decoder_layer(
    tokens: np.ndarray,
    question: np.ndarray,
    visible: Sequence[bool],
    weights: Mapping[str, np.ndarray],
    *,
    num_heads: int,
) -> np.ndarray:
    """One answer through one decoder layer: each token looks at its past, then at the question."""
    rows = []
    for place in range(len(tokens)):
        own, past = tokens[place : place + 1], tokens[: place + 1]
        everything = [True] * len(past)
        rows.append(
            attention(own, past, everything, weights, "self_attention", num_heads=num_heads)
        )
    written = np.concatenate(rows)
    looked = attention(written, question, visible, weights, "cross_attention", num_heads=num_heads)
    return mlp(looked, weights)
