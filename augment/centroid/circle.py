r"""The great circle of two latents (Diff-II: *Inversion Circle Interpolation*, CVPR 2025).

Two latents x, y at the angle θ span a great circle; Diff-II draws a place on the whole of it,
uniformly: :math:`z = \frac{\sin((1+a)\theta)}{\sin\theta} x - \frac{\sin(a\theta)}{\sin\theta} y`,
a ~ U(0, 2π/θ). Written from the middle of the arc, at φ = 2π (w_2 − ½) from it,

.. math:: z = \frac{\cos\varphi}{\cos\frac\theta2} \cdot \frac{x + y}2
          + \frac{\sin\varphi}{\sin\frac\theta2} \cdot \frac{y - x}2,

which does not depend on the order of the points and loses no digits at small angles. Weights from
Dir(1, 1) are uniform on the circle. Equal weights give the middle of the arc, a vertex gives the
point opposite to that middle: three quarters of the circle of two latents at a right angle lie
outside the arc between them. Latents of unequal norms span an ellipse through both.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.residuals import Residuals
from augment.core.errors import UserError

MIN_HALF_ANGLE = 5e-4  # nearer to 0 or π/2 there is no circle, and one direction is left out


def circle(residuals: Residuals) -> Float[Tensor, "b k"]:
    """Return the coefficients of a place on the great circle of two points, no more or less."""
    count = residuals.weights.shape[1]
    if count != 2:
        raise UserError(
            f"expected two latents for the rule circle, got {count}; set members to 2, or use slerp"
        )
    half = residuals.cosines[:, 0, 1].acos() / 2
    turn = 2 * math.pi * (residuals.weights[:, 1].double() - 0.5)
    along = turn.cos() / half.cos() / 2
    across = turn.sin() / half.sin() / 2
    # so written that NaN reaches the centroid, which is then refused
    along = torch.where(half >= math.pi / 2 - MIN_HALF_ANGLE, 0, along)
    across = torch.where(half <= MIN_HALF_ANGLE, 0, across)
    return torch.stack([along - across, along + across], 1).to(residuals.weights)
