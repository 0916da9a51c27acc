"""The workloads as JAX users write them: `name(jax, **parameters)` gives the function that is compiled.

Imports neither torch nor fxfunc, nor JAX before it is asked for: the module is used in a process that has JAX alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Array = Any
Params = dict[str, Array]


def mlp_net(params: Params, x: Array, activation: Callable[[Array], Array]) -> Array:
    """The activation between layers w0, b0, w1, b1, ..."""
    last = len(params) // 2 - 1
    for layer in range(last):
        x = activation(x @ params[f"w{layer}"].T + params[f"b{layer}"])
    return x @ params[f"w{last}"].T + params[f"b{last}"]


def cross_entropy(jax: Any, logits: Array, labels: Array) -> Array:
    """Mean over the rows of logits [n, classes]."""
    chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -chosen.mean()


def convolve(jax: Any, x: Array, kernel: Array, bias: Array) -> Array:
    """3x3 without padding, channels first."""
    return jax.lax.conv(x, kernel, (1, 1), "VALID") + bias[:, None, None]


def max_pool(x: Array) -> Array:
    """2x2, the odd row and column left out; by reshaping, which XLA differentiates faster than reduce_window."""
    n, channels, height, width = x.shape
    x = x[:, :, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, channels, height // 2, 2, width // 2, 2).max((3, 5))


def adapt(
    jax: Any, loss: Callable[..., Array], params: Params, x: Array, y: Array, steps: int, lr: float
) -> Params:
    """The parameters after `steps` steps of SGD."""
    for _ in range(steps):
        grads = jax.grad(loss)(params, x, y)
        params = {name: p - lr * grads[name] for name, p in params.items()}
    return params


def meta_gradient(jax: Any, loss: Callable[..., Array], steps: int, lr: float) -> Callable[..., Any]:
    """The gradient of the mean query loss over the tasks, and that loss."""

    def task_loss(params: Params, xs: Array, ys: Array, xq: Array, yq: Array) -> Array:
        return loss(adapt(jax, loss, params, xs, ys, steps, lr), xq, yq)

    def mean_loss(params: Params, *tasks: Array) -> Array:
        return jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(params, *tasks).mean()

    def step(params: Params, *tasks: Array) -> tuple[Params, Array]:
        value, grads = jax.value_and_grad(mean_loss)(params, *tasks)
        return grads, value

    return step


def maml(jax: Any, *, tasks: int, steps: int) -> Callable[..., Any]:
    """`maml25`, `maml1000`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        return ((mlp_net(params, x, jax.nn.relu) - y) ** 2).mean()

    return meta_gradient(jax, loss, steps, 0.01)


def psg(jax: Any, *, batch: int, size: int) -> Callable[..., Any]:
    """`psg8`, `psg28`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        x = jax.nn.relu(convolve(jax, x[None], params["conv1"], params["conv1_bias"]))
        x = jax.nn.relu(convolve(jax, x, params["conv2"], params["conv2_bias"]))
        x = max_pool(x).reshape(1, -1)
        x = jax.nn.relu(x @ params["hidden"].T + params["hidden_bias"])
        return cross_entropy(jax, x @ params["out"].T + params["out_bias"], y[None])

    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))


def ensemble(jax: Any, *, models: int) -> Callable[..., Any]:
    """`ens10`."""

    def one(params: Params, x: Array) -> Array:
        hidden = jax.nn.relu(x @ params["0.weight"].T + params["0.bias"])
        return hidden @ params["2.weight"].T + params["2.bias"]

    return jax.vmap(one, in_axes=(0, None))


def jacobian(jax: Any) -> Callable[..., Any]:
    """`jac`."""
    return jax.jacrev(lambda params, x: mlp_net(params, x, jax.numpy.tanh), argnums=1)


def hessian(jax: Any) -> Callable[..., Any]:
    """`hess`."""
    return jax.hessian(lambda params, x: mlp_net(params, x, jax.numpy.tanh).sum(), argnums=1)


def hessian_batch(jax: Any, *, points: int) -> Callable[..., Any]:
    """`hessb64`."""
    return jax.vmap(hessian(jax), in_axes=(None, 0))
