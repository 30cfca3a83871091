"""Recurrent cores that start anew inside an unroll, wherever an episode does.

Shape suffixes: U = rows in order, B = unrolls, F = features in, H = features out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gates(nn.Linear):
    """What an LSTM's four gates are made of, stacked: four matrices for an optimiser, not one."""


class ResetLSTM(nn.Module):
    """LSTM whose state is zeroed before rows that reset.

    Gates as in `nn.LSTM`, same order, with one bias in place of two that add. Initialised as there,
    but for a forget gate that starts open, by a bias of 1 (Gers et al. 2000; the default in the
    IMPALA authors' TensorFlow): at 0 a cue is halved at every step, and hardly any gradient reaches
    it from a dozen steps on.
    """

    def __init__(self, input_size: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = Gates(input_size, 4 * hidden)
        self.recurrent = Gates(hidden, 4 * hidden, bias=False)
        bound = hidden**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            self.input.bias[hidden : 2 * hidden] += 1.0

    def forward(
        self, x_UBF: Tensor, reset_UB: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Runs the rows in order.

        Args:
            x_UBF: input per row.
            reset_UB: bool, true where the row is the first of an episode.
            state: h and c, each [B, H], before row 0.

        Returns:
            h after every row [U, B, H]; h and c, each [B, H], after the last.
        """
        h, c = self._rows(x_UBF, reset_UB, state)
        return torch.stack(h), (h[-1], c[-1])

    def unroll(
        self, x_UBF: Tensor, reset_UB: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Is `forward` for those who need c too: h and c after every row, each [U, B, H]."""
        h, c = self._rows(x_UBF, reset_UB, state)
        return (torch.stack(h), torch.stack(c)), (h[-1], c[-1])

    def _rows(
        self, x_UBF: Tensor, reset_UB: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns h and c, each [B, H], after each row."""
        h_BH, c_BH = state
        recurrent_HG = self.recurrent.weight.t()
        h, c = [], []
        # The input's share of the gates is one product for all rows; only the rest goes in order.
        rows = zip(self.input(x_UBF).unbind(), reset_UB.unsqueeze(-1).unbind(), strict=True)
        for gates_BG, reset_B1 in rows:
            # Filled, not multiplied: zero times a NaN would carry it into the next episode.
            h_BH = h_BH.masked_fill(reset_B1, 0.0)
            c_BH = c_BH.masked_fill(reset_B1, 0.0)
            i_BH, f_BH, g_BH, o_BH = torch.addmm(gates_BG, h_BH, recurrent_HG).chunk(4, dim=1)
            c_BH = f_BH.sigmoid() * c_BH + i_BH.sigmoid() * g_BH.tanh()
            h_BH = o_BH.sigmoid() * c_BH.tanh()
            h.append(h_BH)
            c.append(c_BH)
        return h, c
