import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from moebert_kernels.compress.scoring.importance import Importance, compute_importance, labelled_loss
from moebert_kernels.compress.scoring.token_scores import TokenScores, group_tokens, token_groups
from moebert_kernels.errors import UserError
from moebert_kernels.models.surgery import find_ffns
from python_ref import affinity as ref
from tests.tiny import VOCAB, WIDTH, batch, build


def make_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [
        {
            **batch(length=6 + i, seed=i),
            "labels": torch.randint(2, (3,), generator=torch.Generator().manual_seed(i)),
        }
        for i in range(count)
    ]


def counts_of(batches) -> torch.Tensor:
    return sum(b["input_ids"][b["attention_mask"] == 1].bincount(minlength=VOCAB) for b in batches)


def by_definition(model, batches) -> torch.Tensor:
    """[L, V, F] by the reference, from gradients that autograd gives at the activations themselves."""
    scores = []
    for ffn in find_ffns(model):
        taken = []
        handle = ffn.w2.register_forward_pre_hook(lambda module, args: taken.append(args[0]))  # noqa: B023
        score_VF = 0
        for b in batches:
            output = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
            (gradient,) = torch.autograd.grad(labelled_loss(output, b), taken[-1])
            real = b["attention_mask"] == 1
            score_VF = score_VF + ref.token_scores(
                taken[-1].detach()[real], gradient[real], b["input_ids"][real], VOCAB
            )
        handle.remove()
        scores.append(score_VF)
    return torch.stack(scores)


@pytest.mark.parametrize("chunk", [0, 3])
def test_one_backward_per_batch_equals_the_definition(chunk):
    """In chunks too: the positions of a chunk decide whose tokens its rows are."""
    model = build(BertForSequenceClassification).double()
    batches = [b for b in make_batches(4) if not chunk or b["input_ids"].shape[1] % chunk == 0]
    expected_LVF = by_definition(model, batches)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = chunk
    group_V = token_groups(model, counts_of(batches))
    importance = compute_importance(model, batches, group_V=group_V)
    seen = counts_of(batches) > 0
    assert importance.tokens.scores_LGF.shape[1] == int(seen.sum())
    torch.testing.assert_close(
        importance.tokens.scores_LGF[:, group_V[seen]].double(), expected_LVF[:, seen], rtol=1e-6, atol=1e-9
    )
    alone = compute_importance(model, batches)
    assert torch.equal(importance.scores_LF, alone.scores_LF)
    assert alone.tokens is None


def test_rare_ids_share_the_scores_of_their_group():
    model, batches = build(BertForSequenceClassification).double(), make_batches()
    group_bytes = 4 * len(find_ffns(model)) * WIDTH
    group_V = token_groups(model, counts_of(batches), limit_bytes=5 * group_bytes + 1)
    assert group_V.unique().tolist() == [0, 1, 2, 3, 4]
    tokens = compute_importance(model, batches, group_V=group_V).tokens
    expected_LGF = torch.zeros(tokens.scores_LGF.shape, dtype=torch.float64)
    expected_LGF.index_add_(1, group_V, by_definition(model, batches))
    torch.testing.assert_close(tokens.scores_LGF.double(), expected_LGF, rtol=1e-6, atol=1e-9)


def test_bert_base_and_minilm_have_the_groups_that_are_promised():
    """The bound that the documentation states, for 2 GiB."""
    assert (2 << 30) // (4 * 12 * 3072) == 14_563
    assert (2 << 30) // (4 * 6 * 1536) > 30_522


@given(seed=st.integers(0, 1000), vocab_size=st.integers(1, 30), most=st.integers(1, 30))
def test_ids_go_to_their_nearest_group(seed, vocab_size, most):
    generator = torch.Generator().manual_seed(seed)
    counts_V = torch.randint(3, (vocab_size,), generator=generator)
    counts_V[-1] += 1
    embedding_VD = torch.randn(vocab_size, 4, generator=generator, dtype=torch.float64)
    group_V = group_tokens(counts_V, embedding_VD, most)
    kept = sorted(range(vocab_size), key=lambda v: (-int(counts_V[v]), v))[
        : min(most, int((counts_V > 0).sum()))
    ]
    is_kept_V = torch.zeros(vocab_size, dtype=torch.bool)
    is_kept_V[kept] = True
    nearest_V = ref.nearest_seen(embedding_VD, is_kept_V)
    number_of = {v: g for g, v in enumerate(sorted(kept))}
    assert group_V.tolist() == [number_of[v] for v in nearest_V.tolist()]


def test_similarities_in_blocks_are_those_of_the_whole(monkeypatch):
    counts_V = (torch.arange(50) % 3 == 0).long()
    embedding_VD = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    whole_V = group_tokens(counts_V, embedding_VD, 50)
    monkeypatch.setattr("moebert_kernels.compress.scoring.token_scores._MOST_SIMILARITIES", 40)
    assert torch.equal(group_tokens(counts_V, embedding_VD, 50), whole_V)


def test_groups_that_cannot_be_made():
    with pytest.raises(ValueError, match=r"one count per token id \[5\], got \(4,\)"):
        group_tokens(torch.ones(4).long(), torch.rand(5, 2), 3)
    with pytest.raises(ValueError, match="no token occurs"):
        group_tokens(torch.zeros(5).long(), torch.rand(5, 2), 3)


def test_a_saved_importance_gives_its_token_scores_back(tmp_path):
    tokens = TokenScores(torch.rand(2, 3, 5), torch.tensor([0, 2, 1, 1]))
    Importance(torch.rand(2, 5), "m", "t", 1, tokens).save(tmp_path / "importance.safetensors")
    loaded = Importance.load(tmp_path / "importance.safetensors").tokens
    assert torch.equal(loaded.scores_LGF, tokens.scores_LGF)
    assert torch.equal(loaded.group_V, tokens.group_V)


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        (torch.rand(3, 5), torch.zeros(4).long(), r"shape \[layers, groups, neurons\], got \(3, 5\)"),
        (torch.rand(2, 3, 5), torch.zeros(4), "one integer per token id"),
        (torch.rand(2, 3, 5), torch.tensor([0, 3]), r"groups in \[0, 3\), found 0 to 3"),
        (-torch.rand(2, 3, 5), torch.zeros(4).long(), "finite and not negative"),
        (torch.full((2, 3, 5), torch.nan), torch.zeros(4).long(), "finite and not negative"),
        (torch.full((2, 3, 5), torch.inf), torch.zeros(4).long(), "finite and not negative"),
    ],
)
def test_token_scores_of_another_kind_are_refused(scores, groups, message):
    with pytest.raises(UserError, match=message):
        TokenScores(scores, groups)


def test_token_scores_must_fit_the_importance():
    with pytest.raises(UserError, match="for 2 layers of 5 neurons, importance scores for 2 of 6"):
        Importance(torch.rand(2, 6), "m", "t", 1, TokenScores(torch.rand(2, 3, 5), torch.zeros(4).long()))


def test_a_batch_of_embeddings_cannot_be_scored_by_token():
    model = build(BertForSequenceClassification)
    embeds = {"inputs_embeds": torch.rand(1, 4, 32), "labels": torch.zeros(1).long()}
    with pytest.raises(ValueError, match="need a batch's input_ids"):
        compute_importance(model, [embeds], group_V=torch.zeros(VOCAB).long())
