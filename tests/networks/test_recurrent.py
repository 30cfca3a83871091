import torch
from torch import Tensor, nn

from headrace.networks.recurrent import ResetLSTM

U, B, F, H = 7, 4, 5, 6


def make() -> tuple[ResetLSTM, Tensor, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    reset_UB = torch.zeros(U, B, dtype=torch.bool)
    reset_UB[3, 1] = reset_UB[0, 2] = reset_UB[4:6, 3] = True
    return ResetLSTM(F, H), torch.randn(U, B, F), reset_UB, (torch.randn(B, H), torch.randn(B, H))


def test_step_by_step_equals_the_whole_unroll() -> None:
    core, x_UBF, reset_UB, state = make()
    y_UBH, end = core(x_UBF, reset_UB, state)
    for t in range(U):
        y_1BH, state = core(x_UBF[t : t + 1], reset_UB[t : t + 1], state)
        torch.testing.assert_close(y_1BH[0], y_UBH[t])
    torch.testing.assert_close(state, end)


def test_equals_torch_where_nothing_resets() -> None:
    core, x_UBF, reset_UB, state = make()
    reference = nn.LSTM(F, H)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(core.input.weight)
        reference.weight_hh_l0.copy_(core.recurrent.weight)
        reference.bias_ih_l0.copy_(core.input.bias)
        reference.bias_hh_l0.zero_()
    expected_UBH, (h_1BH, c_1BH) = reference(x_UBF, tuple(x.unsqueeze(0) for x in state))
    y_UBH, end = core(x_UBF, torch.zeros_like(reset_UB), state)
    torch.testing.assert_close(y_UBH, expected_UBH)
    torch.testing.assert_close(end, (h_1BH[0], c_1BH[0]))


def test_a_reset_forgets_everything_even_nan() -> None:
    core, x_UBF, reset_UB, (h_BH, c_BH) = make()
    x_UBF[:3, 1] = torch.nan
    y_UBH, _ = core(x_UBF, reset_UB, (h_BH, c_BH))
    fresh = torch.zeros(1, H), torch.zeros(1, H)
    expected_U1H, _ = core(x_UBF[3:, 1:2], reset_UB[3:, 1:2], fresh)
    assert y_UBH[:3, 1].isnan().all()
    torch.testing.assert_close(y_UBH[3:, 1], expected_U1H[:, 0])


def test_no_gradient_crosses_a_reset() -> None:
    core, x_UBF, reset_UB, state = make()
    x_UBF.requires_grad_()
    core(x_UBF, reset_UB, state)[0][-1].sum().backward()
    assert x_UBF.grad is not None
    assert (x_UBF.grad[:3, 1] == 0).all()
    assert (x_UBF.grad[3:, 1] != 0).any(dim=-1).all()
    assert (x_UBF.grad[:3, 0] != 0).any(dim=-1).all()


def test_an_unroll_gives_the_state_after_every_row() -> None:
    core, x_UBF, reset_UB, state = make()
    y_UBH, expected_end = core(x_UBF, reset_UB, state)
    (h_UBH, c_UBH), end = core.unroll(x_UBF, reset_UB, state)
    torch.testing.assert_close((h_UBH, end), (y_UBH, expected_end), rtol=0, atol=0)
    for t in range(U):
        _, state_then = core(x_UBF[: t + 1], reset_UB[: t + 1], state)
        torch.testing.assert_close((h_UBH[t], c_UBH[t]), state_then)
