"""Losses of tokens in chunks, of preferences and of rewards against their equations, written out number by number."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dora_vl.backbones.generation import says_true
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.data.batches import Collator
from dora_vl.heads import next_token
from dora_vl.heads.answer import AnswerHead, answer_loss
from dora_vl.heads.next_token import label_losses, losses_of
from dora_vl.heads.objectives import FLAGS, OBJECTIVES, preference_loss, preference_metrics
from dora_vl.heads.preferences import Answers, Hyperparameters
from dora_vl.heads.rewards import SMALLEST_SPREAD, divergence
from tests.backbones.conversations import inputs_of
from tests.backbones.test_decoder import language_samples
from tests.backbones.tiny_language import tiny_language


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CHUNK", 3)


def case(labels: int) -> tuple[Tensor, Tensor, torch.nn.Linear]:
    torch.manual_seed(3)
    head = torch.nn.Linear(5, 11).double().requires_grad_(False)
    return torch.randn(labels, 5, dtype=torch.float64, requires_grad=True), torch.randint(11, (labels,)), head


@pytest.mark.parametrize("labels", [1, 3, 8])
def test_losses_and_gradients_equal_those_of_all_scores_at_once(labels: int) -> None:
    hidden, targets, head = case(labels)
    weights = torch.rand(labels)  # a sample's share of the loss, say
    losses = label_losses(hidden, targets, head)
    scores = head(hidden).float().tolist()
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[target] for row, target in zip(scores, targets.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-5)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden)
    (expected,) = torch.autograd.grad((losses_of(head(hidden), targets) * weights).sum(), hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_half_precision_scores_are_summed_in_float32() -> None:
    hidden, targets, head = case(4)
    assert label_losses(hidden.bfloat16(), targets, head.bfloat16()).dtype == torch.float32


def test_no_label_is_a_zero_with_a_graph() -> None:
    hidden, targets, head = case(0)
    loss = label_losses(hidden, targets, head).sum()
    loss.backward()
    assert (float(loss.detach()), hidden.grad is not None) == (0.0, True)


@pytest.mark.parametrize(("family", "chunked"), [("llama", True), ("gemma2", False), ("granite", False)])
def test_a_model_that_changes_its_scores_keeps_them_whole(monkeypatch, family, chunked) -> None:
    """Gemma 2 caps them, Granite scales them: what stands behind the output layer is theirs."""
    monkeypatch.setattr(next_token, "SMALL_VOCABULARY", 0)
    model = tiny_language(family)
    model.get_output_embeddings().requires_grad_(False)
    backbone, batch = DecoderBackbone(model), inputs_of(Collator(0)(language_samples()))
    whole = backbone(**batch, keep_logits=True)
    scored: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, scores: scored.append(scores[..., 0].numel()))
    again = backbone(**batch)
    assert (max(scored) <= next_token.CHUNK) == chunked
    assert again.logits is None
    torch.testing.assert_close(again.losses, losses_of(whole.logits, whole.targets))
    weight = model.get_decoder().layers[0].self_attn.k_proj.weight
    gradients = [torch.autograd.grad(features.losses.mean(), [weight])[0] for features in (whole, again)]
    torch.testing.assert_close(*gradients)


def test_true_or_false_reads_two_logits_alone() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    assert says_true(logits, true_token=2, false_token=1).tolist() == [True, False, False]


def test_the_answer_list_scores_each_answer_on_its_own() -> None:
    torch.manual_seed(0)
    head = AnswerHead(6, ("yes", "no", "two"))
    assert [tuple(value.shape) for value in head.state_dict().values()] == [(12, 6), (12,), (12,), (12,), (3, 12), (3,)]
    hidden = torch.randn(2, 6)
    scores = head(hidden)
    targets = head.targets([{"yes": 0.9, "two": 0.3}, {"elsewhere": 1.0}])
    assert targets.tolist() == [[pytest.approx(0.9), 0.0, pytest.approx(0.3)], [0.0, 0.0, 0.0]]
    chance = scores.sigmoid()
    by_hand = -(targets * chance.log() + (1 - targets) * (1 - chance).log()).sum() / 2
    torch.testing.assert_close(answer_loss(scores, targets), by_hand)
    assert head.chosen(torch.tensor([[0.0, 2.0, 1.0]])) == ["no"]
    gelu = functional.gelu(head.logit_fc[0](hidden))
    torch.testing.assert_close(scores, head.logit_fc[3](head.logit_fc[2](gelu)))
    with pytest.raises(ValueError, match="twice"):
        AnswerHead(6, ("yes", "yes"))


LOG_PROBS = (-3.1, -4.7, -2.2, -9.4, -0.6, -5.5)
REFERENCE = (-3.4, -4.1, -2.9, -8.8, -0.5, -7.3)
TOKENS = (3, 5, 2, 7, 1, 4)
PREFERRED = (True, False, False, True, True, False)
PAIRS = ((0, 1), (0, 2), (3, 5))
"""One prompt with two rejected answers, one pair, and a prompt with a preferred answer alone."""
BETA, MARGIN, LEVEL = 0.3, 0.7, 0.4


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def answers(log_probs: torch.Tensor) -> Answers:
    return Answers(
        log_probs,
        torch.tensor(REFERENCE, dtype=log_probs.dtype),
        torch.tensor(TOKENS, dtype=log_probs.dtype),
        torch.where(torch.tensor(PREFERRED), 1.0, -1.0),
        torch.tensor(PAIRS).T,
    )


NO_PAIRS = torch.zeros(2, 0, dtype=torch.int64)


def gain(p: tuple[float, ...], number: int) -> float:
    return p[number] - REFERENCE[number]


def mean(p: tuple[float, ...], number: int) -> float:
    return p[number] / TOKENS[number]


def odds(p: tuple[float, ...], number: int) -> float:
    q = math.exp(mean(p, number))
    return math.log(q / (1 - q))


def margin(p: tuple[float, ...], w: int, o: int) -> float:
    return BETA * (gain(p, w) - gain(p, o))


LOSSES = {name: row.loss for name, row in OBJECTIVES.items() if row.loss is not None}
POLICIES = {name: row.policy for name, row in OBJECTIVES.items() if row.policy is not None}


def likelihood(p: tuple[float, ...]) -> float:
    """What supervised tuning takes of the preferred answers."""
    return -(p[0] + p[3] + p[4]) / (3 + 7 + 1)


def judged(p: tuple[float, ...], y: int, *, good: bool, threshold: float = 0.0) -> float:
    """A binary classifier's loss."""
    return -math.log(sigmoid((1 if good else -1) * (BETA * gain(p, y) - threshold)))


PAIRED: dict[str, Callable[[tuple[float, ...], int, int], float]] = {
    "dpo": lambda p, w, o: -math.log(sigmoid(margin(p, w, o))),
    "ipo": lambda p, w, o: (gain(p, w) / TOKENS[w] - gain(p, o) / TOKENS[o] - 1 / (2 * BETA)) ** 2,
    "simpo": lambda p, w, o: -math.log(sigmoid(BETA * (mean(p, w) - mean(p, o)) - MARGIN)),
    "cpo": lambda p, w, o: -math.log(sigmoid(BETA * (p[w] - p[o]))) + likelihood(p),
    "orpo": lambda p, w, o: likelihood(p) - BETA * math.log(sigmoid(odds(p, w) - odds(p, o))),
    "bco": lambda p, w, o: judged(p, w, good=True) + judged(p, o, good=False),
    "apo_zero": lambda p, w, o: 1 - sigmoid(BETA * gain(p, w)) + sigmoid(BETA * gain(p, o)),
}
SINGLE: dict[str, Callable[[tuple[float, ...], int, bool], float]] = {
    "kto": lambda p, y, good: 1 - sigmoid((1 if good else -1) * BETA * (gain(p, y) - LEVEL))
}


def written_out(name: str, p: tuple[float, ...]) -> float:
    if name in PAIRED:
        values = [PAIRED[name](p, w, o) for w, o in PAIRS]
    elif name == "sft":
        values = [likelihood(p)]
    elif name == "anchor":
        values = [judged(p, y, good=True) for y, good in enumerate(PREFERRED) if good]
    else:
        values = [SINGLE[name](p, number, good) for number, good in enumerate(PREFERRED)]
    return sum(values) / len(values)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_equations(name: str) -> None:
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](answers(log_probs), Hyperparameters(beta=BETA, margin=MARGIN, kl=LEVEL))
    assert loss.item() == pytest.approx(written_out(name, LOG_PROBS), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    step = 1e-6
    for number in range(len(LOG_PROBS)):
        up, down = (
            written_out(name, tuple(value + sign * step * (place == number) for place, value in enumerate(LOG_PROBS)))
            for sign in (1, -1)
        )
        assert gradient[number].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", [name for name in LOSSES if not OBJECTIVES[name].needs_reference])
def test_losses_without_a_reference_ask_for_none(name: str) -> None:
    given = answers(torch.tensor(LOG_PROBS))
    bare = given._replace(reference=None)
    torch.testing.assert_close(LOSSES[name](bare, Hyperparameters()), LOSSES[name](given, Hyperparameters()))


@pytest.mark.parametrize("name", [name for name in LOSSES if FLAGS in OBJECTIVES[name].takes])
def test_losses_of_single_answers_need_no_pair(name: str) -> None:
    given = answers(torch.tensor(LOG_PROBS))
    alone = given._replace(pairs=NO_PAIRS)
    value, with_pairs = (LOSSES[name](each, Hyperparameters(beta=BETA)) for each in (alone, given))
    if name in ("sft", "kto", "anchor"):
        assert value == with_pairs
    if name == "bco":
        rewards = [BETA * gain(LOG_PROBS, number) for number in range(6)]
        threshold = ((rewards[0] + rewards[3] + rewards[4]) / 3 + (rewards[1] + rewards[2] + rewards[5]) / 3) / 2
        expected = [judged(LOG_PROBS, y, good=good, threshold=threshold) for y, good in enumerate(PREFERRED)]
        torch.testing.assert_close(value, torch.tensor(expected).mean())
    if name == "apo_zero":
        expected = [sigmoid((-BETA if good else BETA) * gain(LOG_PROBS, y)) for y, good in enumerate(PREFERRED)]
        torch.testing.assert_close(value, torch.tensor(expected).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_answer_under_other_pictures_is_a_term_of_its_own(name: str) -> None:
    """Answers 1 and 5 are 0 and 3 under other pictures: the mean over these pairs is added to that over the rest."""
    own, exchanged = torch.tensor([(0, 2)]).T, torch.tensor([(0, 1), (3, 5)]).T
    given = answers(torch.tensor(LOG_PROBS, dtype=torch.float64))._replace(pairs=own)
    scale = Hyperparameters(beta=BETA, margin=MARGIN, kl=LEVEL)
    value = preference_loss(given, scale, {name: 0.5}, exchanged=exchanged).item()
    if name in PAIRED:
        expected = PAIRED[name](LOG_PROBS, 0, 2)
        if OBJECTIVES[name].exchanged == "pair":
            expected += (PAIRED[name](LOG_PROBS, 0, 1) + PAIRED[name](LOG_PROBS, 3, 5)) / 2
        assert (OBJECTIVES[name].exchanged == "pair") == (name not in ("cpo", "orpo"))
    else:
        expected = written_out(name, LOG_PROBS)
    assert value == pytest.approx(0.5 * expected, rel=1e-12)
    found = preference_metrics(given, BETA, {"dpo": 1.0}, exchanged=exchanged)
    looks = (margin(LOG_PROBS, 0, 1) + margin(LOG_PROBS, 3, 5)) / 2
    assert found["rewards/picture_margin"].item() == pytest.approx(looks, rel=1e-12)
    assert found["rewards/rejected"].item() == pytest.approx(BETA * gain(LOG_PROBS, 2), rel=1e-12)


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    log_probs = torch.tensor(LOG_PROBS).clone()
    log_probs[0] = 0.0
    log_probs.requires_grad_()
    preference_loss(answers(log_probs), Hyperparameters(beta=BETA), {"orpo": 1.0}, exchanged=NO_PAIRS).backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


PAIR = torch.tensor([[0], [1]])
MEASURED: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("dpo", "kto", "bco", "apo_zero", "anchor"), lambda y: gain(LOG_PROBS, y)),
    "ipo": lambda y: gain(LOG_PROBS, y) / TOKENS[y],
    **dict.fromkeys(("simpo", "orpo", "sft"), lambda y: LOG_PROBS[y] / TOKENS[y]),
    "cpo": lambda y: LOG_PROBS[y],
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("more", [{}, {"sft": 3.0}])
def test_measures_are_what_the_loss_compares(name: str, more: dict[str, float]) -> None:
    given = answers(torch.tensor(LOG_PROBS, dtype=torch.float64))
    given = given._replace(reference=None) if not OBJECTIVES[name].needs_reference else given
    objective = {**more, name: 1.0}
    found = {key: value.item() for key, value in preference_metrics(given, BETA, objective, exchanged=NO_PAIRS).items()}
    margins = [BETA * (MEASURED[name](w) - MEASURED[name](o)) for w, o in PAIRS]
    assert found["rewards/margin"] == pytest.approx(sum(margins) / 3, rel=1e-5)
    assert found["rewards/accuracy"] == pytest.approx(sum(value > 0 for value in margins) / 3)
    chosen = [BETA * MEASURED[name](number) for number, good in enumerate(PREFERRED) if good]
    assert found["rewards/chosen"] == pytest.approx(sum(chosen) / 3, rel=1e-5)
    assert found["log_probs/rejected"] == pytest.approx((-4.7 - 2.2 - 5.5) / 3, rel=1e-5)


def test_a_longer_answer_that_simpo_prefers_has_a_margin_above_0() -> None:
    """The sums say -4, the means +5."""
    given = Answers(torch.tensor([-10.0, -6.0]), None, torch.tensor([10.0, 1.0]), torch.tensor([1.0, -1.0]), PAIR)
    found = preference_metrics(given, 1.0, {"simpo": 1.0}, exchanged=NO_PAIRS)
    assert (found["rewards/margin"].item(), found["rewards/accuracy"].item()) == (5.0, 1.0)


REWARDS = ((1.0, 0.0, 0.25, 1.0), (0.5, 0.5, 0.5, 0.5))
LENGTHS = (3, 1, 2, 4)
LONGEST = 7
NOW = (-0.2, -1.9, -0.7, -2.4, -0.1, -3.0, -0.9, -0.4, -1.1, -2.2)
DRAWN = (-0.5, -1.2, -0.7, -2.9, -0.1, -2.2, -1.4, -0.4, -1.0, -2.6)


def advantage(name: str, group: tuple[float, ...], number: int) -> float:
    above = group[number] - statistics.mean(group)
    if name == "rloo":
        return group[number] - statistics.mean([*group[:number], *group[number + 1 :]])
    return above if name == "dr_grpo" else above / (statistics.stdev(group) + SMALLEST_SPREAD)


WEIGHTS = {
    "grpo": lambda tokens: 1 / (tokens * len(LENGTHS)),
    "dapo": lambda tokens: 1 / sum(LENGTHS),
    "dr_grpo": lambda tokens: 1 / (len(LENGTHS) * LONGEST),
    "rloo": lambda tokens: 1 / len(LENGTHS),
}


@pytest.mark.parametrize("name", POLICIES)
def test_advantages_are_the_papers(name: str) -> None:
    values = POLICIES[name].advantages(torch.tensor(REWARDS, dtype=torch.float64))
    expected = [[advantage(name, group, number) for number in range(4)] for group in REWARDS]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not values[1].any()  # a group without spread teaches nothing


@pytest.mark.parametrize("name", POLICIES)
def test_weights_and_divisor_are_the_papers(name: str) -> None:
    policy, tokens = POLICIES[name], torch.tensor(LENGTHS)
    weights = policy.weights(tokens, LONGEST).double() / policy.divisor(tokens)
    expected = torch.tensor([WEIGHTS[name](count) for count in LENGTHS], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=0)


def test_divergence_is_no_less_than_nothing_and_means_the_kl() -> None:
    now, reference = (torch.tensor(values, dtype=torch.float64) for values in (NOW, DRAWN))
    expected = [math.exp(f - p) - (f - p) - 1 for p, f in zip(NOW, DRAWN, strict=True)]
    assert divergence(now, reference).tolist() == pytest.approx(expected)
    assert float(divergence(now, reference).min()) >= 0
    model, other = (torch.tensor(values, dtype=torch.float64).log() for values in ((0.7, 0.2, 0.1), (0.5, 0.1, 0.4)))
    mean = (model.exp() * divergence(model, other)).sum()  # over what the model draws
    assert mean.item() == pytest.approx((model.exp() * (model - other)).sum().item())
