"""Our answers to README.md's tasks. What it asks besides is answered above the functions.

The docstrings, with shapes, are those of answers.py."""

import numpy as np
import torch

import cm

# --------------------------------------------------------------------------------------------------
# Eq. (1): capacity
def reserved_weight(W_g, B, A):
    return W_g + (B @ A).view_as(W_g)  # row by row, as the authors' code has it


# Find out: nearly a fifth. The rank is 3 * 25, and B and A are [768, 75] and [75, 768].
def new_weights(cout, cin, k, ratio):
    rank = k * max(int(ratio * min(cin, cout)), 1)
    return rank * (k * cout + k * cin)


def merged_state(model):
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, cm.LowRankReserved):
            del state[f"{name}.A"], state[f"{name}.B"], state[f"{name}.layer.weight"]
            state[f"{name}.weight"] = reserved_weight(module.layer.weight, module.B, module.A)
            if module.layer.bias is not None:
                state[f"{name}.bias"] = state.pop(f"{name}.layer.bias")
    return state


# --------------------------------------------------------------------------------------------------
# Eqs. (3) and (2): the loss
def class_weights(counts):
    n = torch.tensor(counts, dtype=torch.float64)
    return len(n) * n / n.sum(), len(n) / (n * (1 / n).sum())


# Find out: at 0.2 the three rarest classes differ, at 1 the five rarest. Few has four: at 0.2 the
# largest of them agrees, at 1 Medium's smallest differs, too.
def turning_count(counts, w_div):
    # N / sum(N) = w_div / (N sum(1 / N)), solved for N
    n = np.array(counts, float)
    return np.sqrt(w_div * n.sum() / (1 / n).sum())


# Think: it is zero; L_CM pushes such a sample no further, and doesn't pull it back. Where w > 0 it
# is bounded: never below 0.
def capacity_loss(eps_theta, eps_theta_g, w, div_margin):
    d = (eps_theta - eps_theta_g).square().mean((1, 2, 3))
    return torch.where(w < 0, w * d.clamp(max=div_margin), w * d)


# Find out: 552 and 3. At IR 100 only 0.2 leaves a minimum in eps_theta. In eps_theta_g the loss has
# none wherever w < 0: the further off, the lower. That is what the fuse is for.
def curvature(counts, w_div, lam):
    omega_con, omega_div = class_weights(counts)
    return 2 * (1 + lam * (omega_con - w_div * omega_div))


def concave_from(num_classes, w_div):
    ir = 1
    while True:
        counts = [ir ** (-c / (num_classes - 1)) for c in range(num_classes)]
        if curvature(counts, w_div, lam=1.0).min() < 0:
            return ir
        ir += 1


# --------------------------------------------------------------------------------------------------
# Base losses and the training step


# Find out: at 100 the image itself (or its double, where the batch has it twice), at 700 mostly
# images of other classes.
# Think: with itself as the reference the target is eps. So OC changes nothing at small t.
def reference_probabilities(x0, x_t, t, alpha_bar):
    a = alpha_bar[t][:, None]  # [B, 1]
    distance = torch.cdist(x_t.flatten(1) / a.sqrt(), x0.double().flatten(1))  # [B, B]
    return (-distance.square() / (2 * (1 / a - 1))).softmax(1)


def reference_shares(x0, y, eps, t):
    alpha_bar = cm.make_alpha_bar()
    t = torch.full_like(y, t)
    p = reference_probabilities(x0, cm.add_noise(x0, t, eps, alpha_bar), t, alpha_bar)
    itself = p.diagonal().mean()
    same_class = (p * (y[:, None] == y)).sum(1).mean()
    return itself, same_class - itself, 1 - same_class


# Think: where w > 0, to agree with itself under other dropout masks; where w < 0, to disagree.
@torch.no_grad()
def two_distances(unet, x_t, t, y):
    def distance():
        eps_theta = unet(x_t, t, y)
        with cm.general_only(unet):
            eps_theta_g = unet(x_t, t, y)
        return (eps_theta - eps_theta_g).square().mean((1, 2, 3))

    in_training = distance()
    unet.eval()  # the one switch
    without_dropout = distance()
    unet.train()
    return in_training, without_dropout


# --------------------------------------------------------------------------------------------------
# Sampling


# By hand: x itself, and the guess x0.
def ddim_step(x, eps, a, a_next):
    x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps


# Find out: s = 1 + w = 2.5.
def guided(model, x, t, labels, guidance):
    eps = model(x, t, labels)
    eps_null = model(x, t, torch.full_like(labels, -1))
    return eps + guidance * (eps - eps_null)


# --------------------------------------------------------------------------------------------------
# Theory


# Find out: the first three; noise brings it towards 1/2.
def monte_carlo_pi_maj(n1, n2, mu, sigma, cos, trials):
    rng = np.random.default_rng()
    mu_1 = mu * np.array([1, 0])
    mu_2 = mu * np.array([cos, np.sqrt(1 - cos**2)])
    class_1 = mu_1 + sigma * rng.standard_normal((trials, n1, 2))
    class_2 = mu_2 + sigma * rng.standard_normal((trials, n2, 2))
    update = class_1.sum(1) + class_2.sum(1)  # [trials, 2]
    return (update @ (mu_1 - mu_2) > 0).mean()


# Think: for orthogonal ones, say. There class 2's gradients push for nobody.
def failing_means(counts, cos):
    # class 2's gradients all push for class 1 against class 3; (F.17) doesn't know them
    mu_1 = np.array([1, 0])
    mu_3 = np.array([cos, np.sqrt(1 - cos**2)])
    v = mu_1 - mu_3
    return np.stack([mu_1, v / np.linalg.norm(v), mu_3])
