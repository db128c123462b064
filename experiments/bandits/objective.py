"""Group losses and their gradients for S data sets and M parameter vectors each, in one call of ``preference_loss``.

``preference_loss`` knows pairs and groups, and no runs.  Runs are stacked as pairs, and group g of run r becomes group
``r G + g``.  Nothing in the loss couples two groups but the weights it is given, so the runs stay apart.

The robust step needs the group losses before it knows the weights of their gradients.  Each group therefore gets its
own copy of theta: one backward then gives the gradient of every group's loss, and a method is how it adds them up.
"""

from __future__ import annotations

import torch

from grpo_kernels import LossType, preference_loss


class GroupObjective:
    """L_g(theta), the mean loss over the pairs of group g, and its gradient.

    Args:
        differences: (S, N, K) feature differences, pairs standing group by group.
        sizes: (G,) pairs of each group, adding up to N.
        num_vectors: M, how many theta are held against each data set.
        loss_type, beta: as ``preference_loss`` takes them.
    """

    def __init__(
        self, differences: torch.Tensor, sizes: tuple[int, ...], num_vectors: int, loss_type: LossType, beta: float
    ) -> None:
        num_sets, num_pairs, num_features = differences.shape
        self.shape = (num_sets, num_vectors, len(sizes), num_features)
        self.loss_type, self.beta = loss_type, beta
        counts = torch.tensor(sizes)
        groups = torch.arange(len(sizes)).repeat_interleave(counts)
        # (S, G K, N): a pair's difference stands in the rows of its group, zeros in the others'.
        blocks = differences.new_zeros(num_sets, len(sizes), num_features, num_pairs)
        blocks[:, groups, :, torch.arange(num_pairs)] = differences.transpose(0, 1)
        self._blocks = blocks.view(num_sets, -1, num_pairs)
        runs = num_sets * num_vectors
        self._group_ids = (torch.arange(runs)[:, None] * len(sizes) + groups).view(-1)
        self._zeros = differences.new_zeros(runs * num_pairs)
        # loss = (1/B) sum_i w l_i with w = B / N_g is the sum of all group means.
        self._weights = (runs * num_pairs / counts.double()).repeat(runs)

    def losses_and_gradients(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """theta (S, M, K) → L (S, M, G) and dL_g/dtheta (S, M, G, K)."""
        copies = theta.unsqueeze(2).expand(self.shape).contiguous().requires_grad_()
        output = self._loss(copies)
        (gradients,) = torch.autograd.grad(output.loss, copies)
        return output.group_losses.view(self.shape[:3]), gradients

    @torch.no_grad()
    def losses(self, theta: torch.Tensor) -> torch.Tensor:
        """theta (S, M, K) → L (S, M, G)."""
        return self._loss(theta.unsqueeze(2).expand(self.shape)).group_losses.view(self.shape[:3])

    def _loss(self, copies: torch.Tensor):
        num_sets, num_vectors, *_ = self.shape
        margins = torch.bmm(copies.reshape(num_sets, num_vectors, -1), self._blocks).view(-1)
        # The normaliser of a log-linear policy and the uniform reference cancel in every margin, so the chosen
        # answer may carry all of <phi_w - phi_l, theta> and the rejected one nothing.
        logps = torch.cat([margins, self._zeros])
        return preference_loss(logps, None, self._group_ids, self._weights, beta=self.beta, loss_type=self.loss_type)
