"""Roles: the right weights in each forward and in each backward, and nothing else changed by asking for them."""

import time
from functools import partial

import pytest
import torch
import torch.multiprocessing
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from pydantic import ValidationError
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.pipelines.sd3 import SD3
from trimtab.roles import REFERENCE, LoraSettings, Roles

LORA = LoraSettings(rank=4, lora_alpha=8, target_modules=SD3.TARGETS)
TOY_LORA = LoraSettings(rank=2, lora_alpha=2, target_modules=("0", "2"))
EITHER = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])


def sd3(num_layers: int = 2) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def sd3_inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict:
    random = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    return {
        "hidden_states": random(batch, 4, 8, 8).to(dtype),
        "encoder_hidden_states": random(batch, 5, 16).to(dtype),
        "pooled_projections": random(batch, 8).to(dtype),
        "timestep": torch.linspace(10, 900, batch),
    }


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


@torch.no_grad()
def shake(roles: Roles, *names: str, size: float = 0.1) -> None:
    """Give each named role weights of its own (a fresh LoRA has B = 0, and then no role can be told from another)."""
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        for weight in roles.parameters(name).values():
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def predict(roles: Roles, role: str, inputs: dict | None = None) -> Tensor:
    return roles(role, **(inputs or sd3_inputs()), return_dict=False)[0]


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Also tells -0.0 from 0.0, which `==` does not."""
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


# --- merged for sampling ---


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_a_role_predicts_the_same_and_afterwards_every_weight_is_what_it_was(dtype, tolerance):
    network, inputs = sd3().to(dtype), sd3_inputs(dtype=dtype)
    roles = Roles(network, frozen=("old",), lora=LORA)
    shake(roles, "default", "old")
    before = copied({name: tensor.float() for name, tensor in network.state_dict().items()})
    expected = {role: predict(roles, role, inputs) for role in ("default", "old", REFERENCE)}
    for role in ("default", "old"):
        with roles.merged(role):
            merged = predict(roles, role, inputs)
        assert (merged - expected[role]).abs().max() < tolerance
        assert (merged - expected[REFERENCE]).abs().max() > 2 * tolerance
        assert same_bits({name: tensor.float() for name, tensor in network.state_dict().items()}, before)
    assert all(torch.equal(predict(roles, role, inputs), value) for role, value in expected.items())


def test_what_is_not_merged_cannot_be_called_meanwhile_nor_can_a_gradient_be_asked_for():
    roles = Roles(sd3(), frozen=("old",), lora=LORA)
    with roles.merged("old"):
        with torch.no_grad(), pytest.raises(RuntimeError, match="role 'old' is merged: only it can be called"):
            predict(roles, "default")
        with pytest.raises(RuntimeError, match="and without gradient"):
            predict(roles, "old")
    with pytest.raises(ZeroDivisionError), roles.merged("old"):
        raise ZeroDivisionError
    predict(roles, "default")


@torch.no_grad()
def test_merging_a_whole_network_or_the_reference_is_nothing():
    for roles, role in ((Roles(sd3(), lora=None), "default"), (Roles(sd3(), lora=LORA), REFERENCE)):
        expected = predict(roles, role)
        with roles.merged(role):
            assert torch.equal(predict(roles, role), expected)
            predict(roles, "default")


# --- how roles start ---


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_role_starts_as_the_pretrained_network_to_the_bit(lora, dtype):
    network, inputs = sd3().to(dtype), sd3_inputs(dtype=dtype)
    before = network(**inputs, return_dict=False)[0].detach()
    roles = Roles(network, trained=("default", "fake"), frozen=("old",), lora=lora)
    for role in ("default", "fake", "old", REFERENCE):
        assert torch.equal(predict(roles, role, inputs), before), role
    assert same_bits(*(copied_as_float(roles, role) for role in ("default", "old")))
    assert same_bits(*(copied_as_float(roles, role) for role in ("default", "fake")))


def copied_as_float(roles: Roles, role: str) -> dict[str, Tensor]:
    return {name: weight.detach().float() for name, weight in roles.parameters(role).items()}


def test_a_lora_starts_from_its_seed_alone_and_leaves_the_global_generator_alone():
    network, half = sd3(), sd3().bfloat16()
    state = torch.get_rng_state()
    starts = [Roles(network, lora=LORA, seed=7).parameters("default")]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    starts.append(Roles(half, lora=LORA, seed=7).parameters("default"))
    assert {weight.dtype for start in starts for weight in start.values()} == {torch.float32}
    assert same_bits(*starts)  # on bfloat16 weights too, without a detour through bfloat16
    other = Roles(sd3(), lora=LORA, seed=8).parameters("default")
    assert gap(starts[0], other) > 0.1
    a = torch.cat([weight.flatten() for name, weight in starts[0].items() if name.endswith("lora_A.weight")])
    assert a.std().item() == pytest.approx(1 / 4, rel=0.05)  # 1 / rank
    assert all(not weight.any() for name, weight in starts[0].items() if name.endswith("lora_B.weight"))


def test_a_lora_role_is_the_backbone_plus_alpha_over_rank_times_b_a():
    roles = Roles(nn.Sequential(nn.Linear(3, 2, bias=False)), lora=LoraSettings(3, 6, ("0",)))
    shake(roles, "default")
    weights, base = roles.parameters("default"), roles.network[0].base_layer.weight
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = x @ (base + 6 / 3 * weights["0.lora_B.weight"] @ weights["0.lora_A.weight"]).T
    assert (roles("default", x) - expected).abs().max() < 1e-6
    assert torch.equal(roles(REFERENCE, x), x @ base.T)


def test_one_backbone_stays_in_memory_whatever_the_number_of_lora_roles():
    backbone, sizes = memory(sd3()), []
    for frozen in ((), ("old",), ("old", "sampler", "ema")):
        network = sd3()
        roles = Roles(network, frozen=frozen, lora=LORA)
        adapter = 4 * sum(weight.numel() for weight in roles.parameters("default").values())
        sizes.append((memory(network) - backbone) / adapter)
    assert sizes == [1, 2, 4]


def test_full_fine_tuning_costs_one_network_per_role_and_ref():
    network = sd3()
    size = memory(network)
    roles = Roles(network, trained=("default", "fake"), frozen=("old",), lora=None)
    assert memory(*(roles._doors[role].network for role in ("default", "fake", "old", REFERENCE))) == 4 * size
    assert memory(network) == size


def memory(*modules: nn.Module) -> int:
    """Bytes of distinct storages behind all parameters and buffers."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# --- what a forward runs with ---


@EITHER
def test_each_role_runs_with_its_own_weights_and_ref_stays_pretrained(lora):
    network = sd3()
    roles = Roles(network, trained=("default", "fake"), frozen=("old",), lora=lora)
    start = predict(roles, REFERENCE).detach()
    shake(roles, "default", "fake", "old")
    outputs = [predict(roles, role) for role in ("default", "fake", "old")]
    assert torch.equal(predict(roles, REFERENCE), start)
    pairs = [(a - b).abs().max() for i, a in enumerate([*outputs, start]) for b in outputs[:i]]
    assert min(pairs) > 1e-3
    assert torch.equal(network(**sd3_inputs(), return_dict=False)[0], outputs[0])  # called directly: the first trained


@EITHER
def test_no_forward_changes_what_requires_grad(lora):
    roles = Roles(sd3(), trained=("default", "fake"), frozen=("old",), lora=lora)
    flags = [gradient_flags(roles)]
    for role in ("old", REFERENCE, "fake", "default", "old"):
        predict(roles, role)
        flags.append(gradient_flags(roles))
    assert all(now == flags[0] for now in flags)
    trained = {id(weight) for role in ("default", "fake") for weight in roles.parameters(role).values()}
    assert {key for key, flag in flags[0].items() if flag} == trained
    assert not predict(roles, "old").requires_grad
    assert not predict(roles, REFERENCE).requires_grad


def gradient_flags(roles: Roles) -> dict[int, bool]:
    return {id(weight): weight.requires_grad for door in roles._doors.values() for weight in door.network.parameters()}


def test_peft_itself_would_change_what_requires_grad():
    """The trap that the test above guards against; when this fails, PEFT has mended it."""
    network = sd3()
    network.add_adapter(LoraConfig(target_modules=["to_q"]), "default")
    with pytest.warns(UserWarning, match="peft_config"):
        network.add_adapter(LoraConfig(target_modules=["to_q"]), "old")
    network.set_adapter("old")
    layer = network.transformer_blocks[0].attn.to_q
    assert layer.lora_A["old"].weight.requires_grad
    assert not layer.lora_A["default"].weight.requires_grad


@EITHER
def test_a_gradient_lands_only_on_the_role_that_ran(lora):
    roles = Roles(sd3(), trained=("default", "fake"), frozen=("old",), lora=lora)
    shake(roles, "default", "fake", "old")
    predict(roles, "fake").square().mean().backward()
    own = {id(weight) for weight in roles.parameters("fake").values()}
    weights = [weight for door in roles._doors.values() for weight in door.network.parameters()]
    graded = {id(weight) for weight in weights if weight.grad is not None}
    assert graded == own


def test_forwards_nest_and_restore_the_outer_role_also_after_an_exception():
    roles = Roles(toy(), trained=("a",), frozen=("b",), lora=TOY_LORA)
    shake(roles, "a", "b")
    x = torch.ones(1, 3)
    plain = {role: roles(role, x).detach() for role in ("a", "b", REFERENCE)}
    inner = []

    def ask_another(*_):  # in the middle of a forward, once
        hook.remove()
        inner.append(roles("b", x))

    hook = roles.network[1].register_forward_hook(ask_another)
    assert torch.equal(roles("a", x), plain["a"])  # module 2 came after the question
    assert torch.equal(inner[0], plain["b"])
    with pytest.raises(RuntimeError, match="shapes"):
        roles("b", torch.ones(1, 4))
    assert torch.equal(roles.network(x), plain["a"])
    assert torch.equal(roles(REFERENCE, x), plain[REFERENCE])


def test_changing_the_role_of_six_sd3_blocks_takes_under_a_tenth_of_a_millisecond():
    roles = Roles(sd3(num_layers=6), frozen=("old",), lora=LORA)
    assert len(roles._layers) == 47
    roles.network.forward = lambda: None  # leaves the door and its switch
    times = []
    for _ in range(200):
        start = time.perf_counter()
        roles("old")
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-4


@pytest.mark.parametrize("meddle", [lambda n: n.set_adapter("old"), lambda n: n.disable_adapters()])
def test_an_adapter_chosen_behind_its_back_is_noticed(meddle):
    network = sd3()
    roles = Roles(network, frozen=("old",), lora=LORA)
    network._hf_peft_config_loaded = True  # what diffusers asks before it does either
    meddle(network)
    with pytest.raises(RuntimeError, match="set_adapter"):
        predict(roles, "default")


def test_copies_follow_the_networks_train_and_eval():
    network = nn.Sequential(nn.Dropout(0.5))
    roles = Roles(nn.Sequential(nn.Linear(1, 1), network), frozen=("old",), lora=None)
    x = torch.ones(64, 1)
    roles.network.eval()
    assert torch.equal(roles("old", x), roles("default", x))
    roles.network.train()
    assert (roles("old", x) == 0).any()


def test_unknown_and_unfit_role_names_are_refused():
    roles = Roles(toy(), frozen=("old",), lora=TOY_LORA)
    with pytest.raises(ValueError, match="'oldd' does not exist; the roles are default, old, ref"):
        roles("oldd", torch.ones(1, 3))
    for refused in (lambda: roles.parameters(REFERENCE), lambda: roles.blend(REFERENCE, "old", 1)):
        with pytest.raises(ValueError, match="'ref' has no weights"):
            refused()
    for trained, frozen in [(("a",), ("a",)), (("a",), (REFERENCE,)), ((), ("a",))]:
        with pytest.raises(ValueError, match="role"):
            Roles(toy(), trained=trained, frozen=frozen, lora=TOY_LORA)


# --- gradient checkpointing ---


def gradients(roles: Roles, inputs: dict, *, during_backward: str) -> dict[str, Tensor]:
    """Of a loss that both trained roles enter, while `during_backward` is the active role of the backbone."""
    loss = (predict(roles, "default", inputs) * predict(roles, "fake", inputs)).square().mean()
    named = {f"{role}/{name}": p for role in ("default", "fake") for name, p in roles.parameters(role).items()}
    with roles._doors[during_backward].switch:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        again = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(found, again, strict=True)
    )
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def two_trained(network: nn.Module, lora: LoraSettings | None) -> Roles:
    roles = Roles(network, trained=("default", "fake"), frozen=("old",), lora=lora)
    shake(roles, "default", "fake", "old")
    return roles


UNET_LORA = LoraSettings(rank=4, lora_alpha=8, target_modules=("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"))
UNET_INPUTS = {name: value for name, value in sd3_inputs().items() if name in ("encoder_hidden_states", "timestep")}
UNET_INPUTS["sample"] = sd3_inputs()["hidden_states"]


@pytest.mark.parametrize("during_backward", ["default", "fake", "old", REFERENCE])
@pytest.mark.parametrize(
    ("make", "lora", "inputs"),
    [(sd3, LORA, sd3_inputs()), (unet, UNET_LORA, UNET_INPUTS), (sd3, None, sd3_inputs())],
    ids=["sd3", "unet", "full"],
)
def test_checkpointed_gradients_are_the_plain_ones_whatever_role_is_active_at_backward(
    make, lora, inputs, during_backward
):
    stored, roles = two_trained(make(), lora), two_trained(make(), lora)
    once, more = count_forwards(stored), count_forwards(roles)
    plain = gradients(stored, inputs, during_backward="default")
    roles.enable_gradient_checkpointing()
    assert gap(gradients(roles, inputs, during_backward=during_backward), plain) < 1e-7
    assert len(more) > len(once)  # it did recompute
    assert roles._active == ["default"]


def count_forwards(roles: Roles) -> list:
    """Grows by one whenever a module of a trained role runs, also in backward."""
    seen = []
    for network in {
        id(network): network for network in (roles._doors[role].network for role in roles.trained)
    }.values():
        for module in network.modules():
            module.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("during_backward", ["default", "fake"])
def test_diffusers_own_checkpointing_would_give_wrong_gradients(during_backward):
    """The trap that the test above guards against: a segment is recomputed with whichever role is active by then."""
    plain = gradients(two_trained(sd3(), LORA), sd3_inputs(), during_backward="default")
    roles = two_trained(sd3(), LORA)
    roles.network.enable_gradient_checkpointing()
    wrong = gradients(roles, sd3_inputs(), during_backward=during_backward)
    assert any(name not in wrong or (wrong[name] - plain[name]).abs().max() > 1e-4 for name in plain)


def test_checkpointing_works_under_autocast():
    found = []
    for checkpointed in (False, True):
        roles = two_trained(sd3(), LORA)
        if checkpointed:
            roles.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16):
            output = predict(roles, "fake")
        predict(roles, "old")
        output.float().square().mean().backward()
        found.append({n: p.grad for n, p in roles.parameters("fake").items() if p.grad is not None})
    assert gap(*found) < 1e-6


def test_the_frozen_copy_of_full_fine_tuning_is_checkpointed_for_whoever_differentiates_its_inputs():
    roles = Roles(sd3(), lora=None)
    roles.enable_gradient_checkpointing()
    inputs = sd3_inputs() | {"hidden_states": sd3_inputs()["hidden_states"].requires_grad_()}
    calls = []
    roles.module(REFERENCE).transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    roles(REFERENCE, **inputs)[0].sum().backward()
    assert len(calls) == 2  # forward, and again in backward


def test_a_network_without_checkpointing_says_so():
    with pytest.raises(UserError, match="Sequential has no gradient checkpointing"):
        Roles(toy(), lora=TOY_LORA).enable_gradient_checkpointing()


# --- blend ---


def test_blend_by_hand():
    network = nn.Linear(2, 1, bias=False)
    roles = Roles(network, frozen=("old",), lora=None)
    with torch.no_grad():
        roles.parameters("default")["weight"].copy_(torch.tensor([[1.0, -2.0]]))
        roles.parameters("old")["weight"].copy_(torch.tensor([[5.0, 6.0]]))
    roles.blend("old", "default", 0.75)
    # 0.75 * 5 + 0.25 * 1 = 4 and 0.75 * 6 - 0.25 * 2 = 4; the source is not touched
    assert roles.parameters("old")["weight"].tolist() == [[4.0, 4.0]]
    assert network.weight.tolist() == [[1.0, -2.0]]


@EITHER
def test_blend_with_decay_0_copies_and_with_1_keeps_to_the_bit(lora):
    roles = two_trained(sd3(), lora)
    with torch.no_grad():  # minus zero and infinity are lost in 0 * a + 1 * b
        for role, value in (("default", -0.0), ("old", float("inf"))):
            next(iter(roles.parameters(role).values())).view(-1)[0] = value
    theta, old = (copied(roles.parameters(role)) for role in ("default", "old"))
    roles.blend("old", "default", 1)
    assert same_bits(roles.parameters("old"), old)
    roles.blend("old", "default", 0)
    assert same_bits(roles.parameters("old"), theta)
    roles.blend("fake", "fake", 0.0)
    roles.blend("old", "default", 0.3)  # equal weights stay equal
    assert same_bits(roles.parameters("old"), theta)
    assert same_bits(roles.parameters("default"), theta)


def test_blend_takes_a_and_b_separately():
    roles = two_trained(toy(), TOY_LORA)
    theta, old = (copied(roles.parameters(role)) for role in ("default", "old"))
    roles.blend("old", "default", 0.9)
    assert gap(roles.parameters("old"), {name: 0.9 * old[name] + 0.1 * theta[name] for name in old}) < 1e-7
    assert not any(p.requires_grad for p in roles.parameters("old").values())


def test_blend_computes_in_float32_and_copies_buffers():
    network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).bfloat16()
    roles = two_trained(network, None)
    old, theta = (roles.parameters(role)["0.weight"].float() for role in ("old", "default"))
    roles("default", torch.randn(8, 64, dtype=torch.bfloat16))  # moves the running statistics
    roles.blend("old", "default", 0.3)
    exact = 0.3 * old + 0.7 * theta
    # bfloat16 has 8 significant bits, so rounding once, to the nearest, is off by at most 2^-8 of the value
    assert ((roles.parameters("old")["0.weight"].float() - exact).abs() <= exact.abs() * 2**-7.99).all()
    states = roles.state_dict()
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(states["old"][name], states["default"][name])
    assert states["old"]["1.num_batches_tracked"] == 1


def test_a_tied_weight_is_blended_once():
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    network[1].weight = network[0].weight
    roles = Roles(network, frozen=("old",), lora=None)
    with torch.no_grad():
        roles.network[0].weight.fill_(1)
        roles.parameters("old")["0.weight"].fill_(0)
    roles.blend("old", "default", 0.5)
    assert roles.parameters("old")["0.weight"].unique().tolist() == [0.5]


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        Roles(toy(), frozen=("old",), lora=TOY_LORA).blend("old", "default", decay)


def test_a_blend_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient():
    roles = two_trained(toy(), None)
    loss = roles("default", torch.ones(1, 3)).sum()
    roles.blend("default", "old", 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_within_one_autocast_region_a_changed_weight_is_ignored_and_with_one_region_per_forward_not():
    """Why callers open a region per forward: torch keeps the first cast of a weight that requires grad."""
    roles, x = two_trained(toy(), TOY_LORA), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = roles("default", x)
        assert not torch.equal(roles("fake", x), before)  # changing the role is safe: its tensors are others
        roles.blend("default", "fake", 0)
        assert torch.equal(roles("default", x), before)  # stale
    with torch.autocast("cpu", torch.bfloat16):
        after = roles("default", x)
        assert torch.equal(after, roles("fake", x))
        assert not torch.equal(after, before)


# --- states ---


@EITHER
def test_a_state_goes_round_exactly_and_holds_every_role_but_ref(lora):
    roles = two_trained(sd3(), lora)
    state = {role: copied(tensors) for role, tensors in roles.state_dict().items()}
    assert list(state) == ["default", "fake", "old"]
    assert state["default"].keys() == state["old"].keys()
    before = {role: predict(roles, role).detach() for role in state}
    fresh = Roles(sd3(), trained=("default", "fake"), frozen=("old",), lora=lora, seed=5)
    start = predict(fresh, REFERENCE).detach()
    fresh.load_state_dict(state)
    assert all(same_bits(fresh.state_dict()[role], state[role]) for role in state)
    assert all(torch.equal(predict(fresh, role), before[role]) for role in state)
    assert torch.equal(predict(fresh, REFERENCE), start)


def test_a_full_state_holds_what_torch_saves_buffers_too():
    network = nn.BatchNorm1d(3)
    network.register_buffer("table", torch.ones(1), persistent=False)
    roles = Roles(network, frozen=("old",), lora=None)
    assert roles.state_dict(["old"])["old"].keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("old"), "the saved roles do not fit: missing old, unexpected nothing"),
        (lambda s: s.update(older=s["old"]), "unexpected older"),
        (lambda s: s["old"].pop("2.lora_B.weight"), r"role 'old' do not fit: missing 2\.lora_B\.weight"),
        (lambda s: s["old"].update(x=torch.ones(1)), "missing nothing, unexpected x"),
        (lambda s: s["old"].update({"0.lora_A.weight": torch.ones(3, 3)}), r"as \(3, 3\) .* has \(2, 3\)"),
        (lambda s: s["old"].update({"0.lora_A.weight": torch.ones(2, 3).double()}), "float64, and this network"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, message):
    roles = two_trained(toy(), TOY_LORA)
    state = {role: {name: t + 1 for name, t in tensors.items()} for role, tensors in roles.state_dict().items()}
    before = {role: copied(tensors) for role, tensors in roles.state_dict().items()}
    spoil(state)
    with pytest.raises(UserError, match=message):
        roles.load_state_dict(state)
    assert all(same_bits(roles.state_dict()[role], before[role]) for role in before)


def test_a_lora_state_has_pefts_names_and_gives_the_role_in_stock_diffusers():
    roles = two_trained(sd3(), LORA)
    state = copied(roles.lora_state("fake"))
    assert same_bits(state, get_peft_model_state_dict(roles.network, adapter_name="fake"))
    stock = sd3()
    stock.load_lora_adapter(dict(state), prefix=None, metadata=LORA.peft_config().to_dict())
    assert (stock(**sd3_inputs(), return_dict=False)[0] - predict(roles, "fake")).abs().max() < 1e-6


def test_the_peft_config_gives_the_role_in_stock_peft():
    roles = two_trained(toy(), TOY_LORA)
    stock = inject_adapter_in_model(TOY_LORA.peft_config(), toy(), "default")
    for name, weight in roles.lora_state("default").items():
        stock.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(weight)
    assert torch.equal(stock(torch.ones(1, 3)), roles("default", torch.ones(1, 3)))


def test_a_whole_network_is_no_lora():
    roles = Roles(toy(), lora=None)
    with pytest.raises(ValueError, match="whole network"):
        roles.lora_state("default")


# --- settings ---


def test_targets_that_are_no_linear_modules_are_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"'to_qq' names no module; choose from .*add_k_proj, .*to_out\.0, to_q, to_v"):
        Roles(sd3(), lora=LoraSettings(target_modules=("to_q", "to_qq")))
    with pytest.raises(UserError, match=r"'attn' names transformer_blocks\.0\.attn, which is not a Linear"):
        Roles(sd3(), lora=LoraSettings(target_modules=("attn",)))
    with pytest.raises(UserError, match=r"'conv1' names .*conv1, which is not a Linear"):
        Roles(unet(), lora=LoraSettings(target_modules=("conv1",)))


def test_a_lora_without_targets_is_refused_for_a_bare_network_does_not_say_which():
    with pytest.raises(ValueError, match="without target modules"):
        Roles(sd3(), lora=LoraSettings())


def test_a_network_that_carries_adapters_is_refused():
    network = toy()
    Roles(network, lora=TOY_LORA)
    with pytest.raises(UserError, match="already carries adapters"):
        Roles(network, lora=TOY_LORA)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"lora_alpha": -1}, {"target_modules": ()}, {"init": "gauss"}, {"dropout": 0.1}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        LoraSettings(**wrong)


# --- scaled ---


@torch.no_grad()
def test_a_scaled_lora_counts_that_many_times_and_only_inside():
    # One layer, so that what it says is linear in its LoRA.
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(3, 5)), torch.randn(4, 3)
    roles = Roles(network, lora=LoraSettings(rank=2, lora_alpha=2, target_modules=("0",)))
    shake(roles, "default")
    bare, whole = roles(REFERENCE, x), roles("default", x)
    for factor in (0.0, 0.375, 2.0):
        with roles.scaled("default", factor):
            assert (roles("default", x) - (bare + factor * (whole - bare))).abs().max() < 1e-6
    assert torch.equal(roles("default", x), whole)
    assert (whole - bare).abs().max() > 1e-3
    with (
        pytest.raises(ValueError, match="only a LoRA can be scaled"),
        Roles(toy(), lora=None).scaled("default", 0.5),
    ):
        pass
