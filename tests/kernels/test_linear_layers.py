"""Faster layers compute what the plain ones do, and leave the model what it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.kernels import linear_layers, matmul
from rlhf_ppo.kernels.linear_layers import FastConv1D, FastLinear, use_fast_layers, use_plain_layers
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.models.scoring import TokenPolicy
from tests.benchmarks.allocations import peak_bytes
from tests.support.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch carries no oneDNN linear kernel"
)


@pytest.fixture(autouse=True)
def _onednn_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine measures."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear_layers, "onednn_is_faster", lambda: True)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=64)).eval()


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=97, pad_token_id=0)).eval()


@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
def test_a_fast_layer_has_the_plain_ones_output_and_gradients(layer: nn.Module) -> None:
    fast: Any = copy.deepcopy(layer)
    fast.__class__ = linear_layers.FAST_CLASSES[type(layer)]
    gradients = []
    torch.manual_seed(0)
    x, weights = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    for module in (layer, fast):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        gradients.append([output, *torch.autograd.grad((output * weights).sum(), [leaf, *module.parameters()])])
    for plain, ours in zip(*gradients, strict=True):
        assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        assert ours.stride() == plain.stride()  # the optimizer's kernels and DDP's buckets count on it


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_model_of_fast_layers_has_the_same_log_probabilities_and_gradients(build: Callable[[], Any]) -> None:
    plain, fast = build(), build()
    assert use_fast_layers(fast) > 0
    ids = torch.randint(0, 97, (3, 17))
    results = []
    for model in (plain, fast):
        logprobs = torch.log_softmax(model(input_ids=ids).logits, dim=-1)
        logprobs[..., 5].sum().backward()
        results.append([logprobs, *(parameter.grad for parameter in model.parameters())])
    assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)
    for ours, theirs in zip(results[1][1:], results[0][1:], strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_fast_layers_can_be_differentiated_twice() -> None:
    """Fisher products need it."""
    layer: nn.Module = nn.Linear(6, 4).double()
    fast = copy.deepcopy(layer).float()
    fast.__class__ = FastLinear
    x = torch.randn(5, 6)
    curvatures = []
    for module, inputs in ((layer, x.double()), (fast, x)):
        loss = module(inputs).tanh().square().sum()
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()), create_graph=True)]
        )
        curvatures.append([g.float() for g in torch.autograd.grad(gradient.square().sum(), list(module.parameters()))])
    assert_close(curvatures[1], curvatures[0], rtol=1e-4, atol=1e-5)


def test_names_copies_and_saved_tensors_are_those_of_the_plain_model() -> None:
    model = gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_fast_layers(model)
    assert_close(model.state_dict(), before)
    assert isinstance(copy.deepcopy(model).transformer.h[0].attn.c_attn, FastConv1D)
    use_plain_layers(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D and type(model.lm_head) is nn.Linear


def test_adapters_find_fast_layers_and_train() -> None:
    model = llama()
    use_fast_layers(model)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


def test_other_precisions_go_the_plain_way() -> None:
    layer: nn.Module = nn.Linear(4, 4).double()
    layer.__class__ = FastLinear
    assert layer(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 4)).dtype == torch.bfloat16
    assert layer(torch.ones(0, 4)).shape == (0, 4)


def test_a_slower_onednn_leaves_the_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "onednn_is_faster", lambda: False)
    model = gpt2()
    assert use_fast_layers(model) == 2  # activations
    assert type(model.lm_head) is nn.Linear


def test_libraries_are_timed_in_turns() -> None:
    """A shared processor changes its pace for longer than all calls of one library take."""
    calls: list[str] = []
    matmul.measure_seconds(lambda: calls.append("ours"), lambda: calls.append("theirs"), repeats=3)
    assert calls == ["ours", "theirs"] * 4


def test_inside_the_context_alone_layers_are_fast() -> None:
    model = gpt2()
    with linear_layers.fast_layers(model):
        assert type(model.lm_head) is FastLinear
    assert type(model.lm_head) is nn.Linear
    use_fast_layers(model)
    with linear_layers.fast_layers(model):
        pass
    assert type(model.lm_head) is FastLinear  # it was before


def test_low_products_are_close_and_everything_else_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 keeps 8 bits, so a product is off by about 1/256; gradients point the same way."""
    monkeypatch.setattr(linear_layers, "bfloat16_is_faster", lambda: True)
    results = []
    for low in (False, True):
        model = gpt2()
        assert use_fast_layers(model, matmul_dtype=torch.bfloat16 if low else None) > 0
        logprobs = torch.log_softmax(model(input_ids=torch.arange(17)[None]).logits, dim=-1)
        logprobs[..., 5].sum().backward()
        assert logprobs.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        results.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (plain, theirs), (ours, found) = results
    assert 0 < float((ours - plain).abs().max()) < 2e-2
    assert float(torch.cosine_similarity(found, theirs, dim=0)) > 0.999


@pytest.mark.parametrize("layer", [nn.Linear(24, 40), Conv1D(40, 24)])
def test_low_layers_keep_what_plain_ones_keep_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module
) -> None:
    """The input, which layers beside it keep as well, and the weight: no copy of either."""
    monkeypatch.setattr(linear_layers, "bfloat16_is_faster", lambda: True)
    use_fast_layers(layer, matmul_dtype=torch.bfloat16)
    x, kept = torch.randn(3, 5, 24, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.data_ptr()) or saved, lambda x: x):
        layer(x).sum().backward()
    weight: Any = layer.weight
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])


def test_low_weights_are_kept_inside_the_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that outlived it would be one optimizer step behind."""
    monkeypatch.setattr(linear_layers, "bfloat16_is_faster", lambda: True)
    model = llama()
    use_fast_layers(model, matmul_dtype=torch.bfloat16)
    with linear_layers.fast_layers(model):
        assert model.lm_head.low_precision_weight.dtype == torch.bfloat16
    assert model.lm_head.low_precision_weight is None
    before = model(input_ids=torch.arange(5)[None]).logits
    with torch.no_grad():
        model.lm_head.weight.data.mul_(2)
    assert_close(model(input_ids=torch.arange(5)[None]).logits, 2 * before)


def test_narrow_layers_keep_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "bfloat16_is_faster", lambda: True)
    head = nn.Sequential(nn.Linear(64, 1), nn.Linear(64, 64))
    use_fast_layers(head, matmul_dtype=torch.bfloat16)
    assert [getattr(layer, "matmul_dtype", None) for layer in head] == [None, torch.bfloat16]


def test_scoring_in_chunks_casts_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a large vocabulary cost more to cast than a chunk of tokens to score."""
    monkeypatch.setattr(linear_layers, "bfloat16_is_faster", lambda: True)
    model = llama()
    use_fast_layers(model, matmul_dtype=torch.bfloat16)
    inputs = TokenInputs(prompts=[torch.arange(1, 4)], responses=[torch.arange(1, 41)])
    casts: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.copy_.default and args[1].shape == model.lm_head.weight.shape:
                casts.append(str(args[0].dtype))
            return function(*args, **(kwargs or {}))

    policy = TokenPolicy(model, chunk_size=16)
    assert policy.paths.fused_head  # proved before
    with torch.no_grad(), Watch():
        policy(inputs)
    assert casts == ["torch.bfloat16"]


def test_scoring_has_no_work_space_of_the_heads_size() -> None:
    """A product with the whole head has one in a kernel's own order, kept for each number of rows."""
    torch.manual_seed(0)
    vocab, width = 20_000, 64
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=vocab, pad_token_id=0)).eval()
    use_fast_layers(model)
    shapes: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.mkldnn._linear_pointwise.default:
                shapes.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    inputs = TokenInputs(prompts=[torch.arange(1, 4)], responses=[torch.arange(1, 41)])
    policy = TokenPolicy(model)
    assert policy.paths.fused_head  # proved before
    with torch.no_grad(), Watch():
        fused = policy(inputs)
    assert sum(rows for rows, _ in shapes if rows > 64) == vocab and max(shapes)[0] <= 4096
    with torch.no_grad():
        plain = TokenPolicy(model, fused_head=False)(inputs)
    assert_close(fused.logprobs, plain.logprobs, rtol=0, atol=1e-5)


def tied_policy(vocab: int = 97, width: int = 32) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": width, "vocab_size": vocab, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    return TokenPolicy(AutoModelForCausalLMWithValueHead.from_pretrained(model))


INPUTS = TokenInputs(prompts=[torch.tensor([5, 6, 5])] * 2, responses=[torch.tensor([7, 5, 5, 9])] * 2)


def gradients_of(
    policy: Any, *, foreseen: bool, of_values: float = 1.0, grad_logprobs: float = 1.0
) -> list[torch.Tensor]:
    """Of a loss that is a sum over tokens, passed twice as two micro-batches are."""
    policy.zero_grad()
    for _ in range(2):
        loss_gradient = LossGradient(lambda logprobs, entropy, rows: (torch.full_like(logprobs, grad_logprobs), None))
        output = policy(INPUTS, loss_gradient=loss_gradient if foreseen else None)
        loss = of_values * output.values.square().sum()
        (loss + grad_logprobs * output.logprobs.sum() if grad_logprobs else loss).backward()
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("of_values", "grad_logprobs"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_rows_of_a_tied_embedding_add_up_to_the_dense_gradient(of_values: float, grad_logprobs: float) -> None:
    """Also where the loss reads the values alone, and the head's part of the sum is zero."""
    policy = tied_policy()
    weights = {"of_values": of_values, "grad_logprobs": grad_logprobs}
    fused, plain = (gradients_of(policy, foreseen=foreseen, **weights) for foreseen in (True, False))
    assert not any(gradient.is_sparse for gradient in fused)
    assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_a_tied_embedding_needs_no_second_gradient_of_its_size() -> None:
    policy = tied_policy(20_000, 128)
    assert policy.paths.fused_head  # proved before

    def one_pass() -> None:
        output = policy(
            INPUTS, loss_gradient=LossGradient(lambda logprobs, entropy, rows: (torch.ones_like(logprobs), None))
        )
        output.logprobs.sum().backward()

    assert peak_bytes(one_pass) < 1.5 * 4 * 20_000 * 128


def test_a_policy_whose_head_is_hooked_and_its_reference_score_in_one_way() -> None:
    """Under ZeRO-3 the policy's head is: by two ways, equal models would differ by rounding."""
    torch.manual_seed(0)
    model, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(llama()) for _ in range(2))
    model.pretrained_model.lm_head.register_forward_hook(lambda *_: None)
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2, diagnose=False), model, reference, tiny_tokenizer())
    queries, responses = [torch.arange(3, 9), torch.arange(4, 7)], [torch.arange(5, 40), torch.arange(9, 30)]
    statistics = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)])
    assert statistics["objective/kl"] == 0.0
    for scored in (trainer.scorer.policy, trainer.scorer.reference):
        assert isinstance(scored, TokenPolicy) and not scored.fused_scoring
