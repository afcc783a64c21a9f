r"""Ascents: how a direction becomes the perturbation :math:`\varepsilon`.

An ascent is an :class:`optax.GradientTransformationExtraArgs` whose ``update`` takes a
*direction* (usually the gradient) where an optimizer takes gradients, and returns
:math:`\varepsilon` where an optimizer returns updates::

    epsilon, state = ascent.update(direction, state, params)

Use one inside :func:`msam_optax.sharpness_aware_gradient` (SAM) or
:func:`msam_optax.momentum_perturbation` (MSAM). :func:`restrict` confines one
to some of the parameters. (``optax.masked(ascent, mask)`` does so too, but only last in
a chain: the two leave a parameter that its ascent hands back untouched unperturbed.)
Write your own with :func:`make`.

Where an ascent speaks of layers, weights or filters, its ``axes`` say which axes of a
parameter these are: :class:`Axes`. Layers that a scan has stacked need it::

    def axes(path, parameter):
        scanned = "layers" in jax.tree_util.keystr(path)
        return msam_optax.ascents.Axes(stacked=0) if scanned else None
"""

from msam_optax._base.layers import Axes as Axes
from msam_optax.ascents._fisher import fisher as fisher
from msam_optax.ascents._friendly import FriendlyAscentState as FriendlyAscentState
from msam_optax.ascents._friendly import friendly as friendly
from msam_optax.ascents._make import Perturb as Perturb
from msam_optax.ascents._make import make as make
from msam_optax.ascents._normalized import loss_equated as loss_equated
from msam_optax.ascents._normalized import normalized as normalized
from msam_optax.ascents._normalized import unnormalized as unnormalized
from msam_optax.ascents._random import RandomAscentState as RandomAscentState
from msam_optax.ascents._random import gaussian as gaussian
from msam_optax.ascents._random import stochastic as stochastic
from msam_optax.ascents._restrict import restrict as restrict
from msam_optax.ascents._scaled import adaptive as adaptive
from msam_optax.ascents._scaled import clip_by_weight_norm as clip_by_weight_norm
from msam_optax.ascents._scaled import filterwise as filterwise
from msam_optax.ascents._scaled import layerwise as layerwise
from msam_optax.ascents._scaled import weight_scaled as weight_scaled
from msam_optax.ascents._spectral import spectral as spectral

__all__ = [
    "Axes",
    "FriendlyAscentState",
    "Perturb",
    "RandomAscentState",
    "adaptive",
    "clip_by_weight_norm",
    "filterwise",
    "fisher",
    "friendly",
    "gaussian",
    "layerwise",
    "loss_equated",
    "make",
    "normalized",
    "restrict",
    "spectral",
    "stochastic",
    "unnormalized",
    "weight_scaled",
]
