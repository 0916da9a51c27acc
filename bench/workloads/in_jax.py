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
    """3x3 without padding, channels first, as one product with nine shifted images.

    By jax.lax.conv the workloads take 1.5 to 14 times as long on a CPU: kernels under vmap become grouped convolutions.
    """
    n, channels, height, width = x.shape
    shifts = [x[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    patches = jax.numpy.stack(shifts, axis=2)
    flat = kernel.reshape(len(kernel), channels, 9)
    return jax.numpy.einsum("ncshw,ocs->nohw", patches, flat) + bias[:, None, None]


def max_pool(jax: Any, x: Array) -> Array:
    """2x2, an odd row and column left out."""
    window = (1, 1, 2, 2)
    return jax.lax.reduce_window(x, -jax.numpy.inf, jax.lax.max, window, window, "VALID")


def adapt(
    jax: Any, loss: Callable[..., Array], params: Params, x: Array, y: Array, steps: int, lr: float
) -> Params:
    """The parameters after `steps` steps of SGD."""
    for _ in range(steps):
        grads = jax.grad(loss)(params, x, y)
        params = {name: p - lr * grads[name] for name, p in params.items()}
    return params


def task_losses(jax: Any, loss: Callable[..., Array], steps: int, lr: float) -> Callable[..., Array]:
    """Each task's query loss after its own steps."""

    def one(params: Params, xs: Array, ys: Array, xq: Array, yq: Array) -> Array:
        return loss(adapt(jax, loss, params, xs, ys, steps, lr), xq, yq)

    return jax.vmap(one, in_axes=(None, 0, 0, 0, 0))


def grad_and_value(jax: Any, f: Callable[..., Array], has_aux: bool = False) -> Callable[..., Any]:
    """jax.value_and_grad with the answers in torch.func's order; with `has_aux`, f's second result is the value."""

    def both(*args: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(f, has_aux=has_aux)(*args)
        return grads, value[1] if has_aux else value

    return both


def meta_gradient(jax: Any, loss: Callable[..., Array], steps: int, lr: float) -> Callable[..., Any]:
    """The gradient of the mean query loss over the tasks, and that loss."""
    losses = task_losses(jax, loss, steps, lr)
    return grad_and_value(jax, lambda params, *tasks: losses(params, *tasks).mean())


def maml(jax: Any, *, tasks: int, steps: int) -> Callable[..., Any]:
    """`maml25`, `maml1000`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        return ((mlp_net(params, x, jax.nn.relu) - y) ** 2).mean()

    return meta_gradient(jax, loss, steps, 0.01)


def digits(jax: Any, *, tasks: int, steps: int) -> Callable[..., Any]:
    """`digits`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        hidden = jax.nn.relu(x @ params["w1"].T + params["b1"])
        return cross_entropy(jax, hidden @ params["w2"].T + params["b2"], y)

    return meta_gradient(jax, loss, steps, 0.1)


def digits_cnn(jax: Any, *, tasks: int, steps: int) -> Callable[..., Any]:
    """`digits-cnn`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        x = max_pool(jax, jax.nn.relu(convolve(jax, x, params["conv"], params["conv_bias"])))
        return cross_entropy(jax, x.reshape(len(x), -1) @ params["out"].T + params["out_bias"], y)

    return meta_gradient(jax, loss, steps, 0.1)


def psg(jax: Any, *, batch: int, size: int) -> Callable[..., Any]:
    """`psg8`, `psg28`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        x = jax.nn.relu(convolve(jax, x[None], params["conv1"], params["conv1_bias"]))
        x = jax.nn.relu(convolve(jax, x, params["conv2"], params["conv2_bias"]))
        x = max_pool(jax, x).reshape(1, -1)
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
    one = jax.hessian(lambda params, x: mlp_net(params, x, jax.numpy.tanh), argnums=1)
    return jax.vmap(one, in_axes=(None, 0))


def batch_norm(jax: Any, x: Array, scale: Array, bias: Array) -> Array:
    """Over the batch and the image, channels first."""
    mean = x.mean((0, 2, 3), keepdims=True)
    variance = x.var((0, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale[:, None, None] + bias[:, None, None]


def omniglot(jax: Any, *, tasks: int, steps: int) -> Callable[..., Any]:
    """`omniglot`, the gradients of the summed losses included."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        for i in (0, 4, 8):  # places in torch's Sequential
            x = convolve(jax, x, params[f"{i}.weight"], params[f"{i}.bias"])
            x = batch_norm(jax, x, params[f"{i + 1}.weight"], params[f"{i + 1}.bias"])
            x = max_pool(jax, jax.nn.relu(x))
        return cross_entropy(jax, x.reshape(len(x), -1) @ params["13.weight"].T + params["13.bias"], y)

    losses = task_losses(jax, loss, steps, 0.1)

    def total(params: Params, *data: Array) -> tuple[Array, Array]:
        each = losses(params, *data)
        return each.sum(), each

    return grad_and_value(jax, total, has_aux=True)


def lennard_jones(jax: Any, *, points: int) -> Callable[..., Any]:
    """`lj`."""

    def net(params: Params, r: Array) -> Array:
        return mlp_net(params, r, jax.numpy.tanh)

    def loss(params: Params, displacements: Array, energies: Array, forces: Array) -> Array:
        r = jax.numpy.linalg.norm(displacements, axis=1, keepdims=True)
        predicted = jax.vmap(net, in_axes=(None, 0))(params, r)
        slopes = jax.vmap(jax.jacrev(net, argnums=1), in_axes=(None, 0))(params, r).squeeze(-1)
        predicted_forces = -slopes * displacements / r
        return ((predicted - energies) ** 2).mean() + 0.001 * ((predicted_forces - forces) ** 2).mean()

    return grad_and_value(jax, loss)


def clipped(jax: Any, loss: Callable[..., Array]) -> Callable[..., Any]:
    """The mean of gradients clipped to norm 1, and the norms."""
    numpy = jax.numpy

    def step(params: Params, x: Array, y: Array) -> tuple[Params, Array]:
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y)
        norms = numpy.sqrt(sum((g**2).reshape(len(g), -1).sum(1) for g in grads.values()))
        scale = numpy.minimum(1 / norms, 1) / len(norms)
        return {name: numpy.einsum("n,n...->...", scale, g) for name, g in grads.items()}, norms

    return step


def dpsgd_mlp(jax: Any, *, batch: int) -> Callable[..., Any]:
    """`dpsgd-mlp`."""

    def loss(params: Params, x: Array, y: Array) -> Array:
        return cross_entropy(jax, mlp_net(params, x[None], jax.nn.relu), y[None])

    return clipped(jax, loss)


def dpsgd_block(jax: Any, *, batch: int) -> Callable[..., Any]:
    """`dpsgd-block`."""
    heads = 4

    def dense(params: Params, name: str, x: Array) -> Array:
        return x @ params[name].T + params[f"{name}_bias"]

    def normalise(params: Params, name: str, x: Array) -> Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params[name] + params[f"{name}_bias"]

    def attend(params: Params, x: Array) -> Array:
        length, width = x.shape
        qkv = dense(params, "qkv", x).reshape(length, 3, heads, width // heads)
        q, k, v = (qkv[:, i].swapaxes(0, 1) for i in range(3))
        weights = jax.nn.softmax(q @ k.mT / (width // heads) ** 0.5)
        return dense(params, "merge", (weights @ v).swapaxes(0, 1).reshape(length, width))

    def loss(params: Params, x: Array, y: Array) -> Array:
        x = x + attend(params, normalise(params, "norm1", x))
        hidden = jax.nn.gelu(dense(params, "up", normalise(params, "norm2", x)), approximate=False)
        x = x + dense(params, "down", hidden)
        return cross_entropy(jax, dense(params, "out", normalise(params, "norm3", x).mean(0))[None], y[None])

    return clipped(jax, loss)


def laplacian(jax: Any, *, batch: int) -> Callable[..., Any]:
    """`lap`."""
    hessian_of = jax.hessian(lambda params, x: mlp_net(params, x, jax.numpy.tanh).squeeze(-1), argnums=1)
    return jax.vmap(lambda params, x: jax.numpy.trace(hessian_of(params, x)), in_axes=(None, 0))
