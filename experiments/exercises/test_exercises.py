"""The checks of the exercises: on answers.py, on our solutions, and on typical wrong answers.

A check takes a namespace with the answer in it, and compares with cm.py and theory.py on inputs
drawn at random."""

import inspect
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # whatever pytest's import mode
import cm
import theory
from experiments.exercises import answers, solutions

torch.set_num_threads(1)


def agree(what, yours, ours):
    """Equal but for float32's rounding?"""
    __tracebackhide__ = True  # a student's traceback ends in the check that failed
    assert yours is not None, f"{what}: nothing was returned"
    yours, ours = (torch.as_tensor(x).detach().double() for x in (yours, ours))
    assert yours.shape == ours.shape, (
        f"{what} has the shape {list(yours.shape)}, it should be {list(ours.shape)}")
    yours, ours = yours.flatten(), ours.flatten()
    worst = (yours - ours).abs().nan_to_num(nan=math.inf).argmax()
    assert torch.allclose(yours, ours, rtol=1e-3, atol=1e-5), (
        f"{what}: where it is furthest off, {yours[worst]:.4g} should be {ours[worst]:.4g}")


def whole(low, high):
    """A random integer, low <= n < high."""
    return int(torch.randint(low, high, ()))


def uniform(low, high):
    return float(torch.empty(()).uniform_(low, high))


def random_counts():
    """Long-tailed counts, in no order: nothing assumes that class 0 is the largest."""
    counts = cm.class_counts(whole(200, 5000), uniform(2, 200), whole(3, 20))
    return [counts[i] for i in torch.randperm(len(counts))]


def small_unet(moved):
    """A UNet with reserved capacity, in training mode; `moved`: BA isn't zero any more."""
    unet = cm.UNet(3, image_channels=1, image_size=8, channels=8, multipliers=(1, 2), blocks=1,
                   attention=())
    for layer in unet.modules():  # cm.py's last layers start near zero; here all do something
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(layer.weight)
    cm.reserve_capacity(unet.decoder)
    for layer in unet.modules():
        if moved and isinstance(layer, cm.LowRankReserved):
            torch.nn.init.normal_(layer.B, std=0.5)
    return unet


# --------------------------------------------------------------------------------------------------
# The checks, in the README's order


def check_reserved_weight(given):
    for _ in range(5):
        cout, cin, k = whole(4, 12), whole(4, 12), whole(1, 4)
        for layer in (torch.nn.Conv2d(cin, cout, k), torch.nn.Linear(cin, cout)):
            reserved = cm.reserve_capacity(layer, 0.3)
            torch.nn.init.normal_(reserved.B)
            yours = given.reserved_weight(reserved.layer.weight, reserved.B, reserved.A)
            agree(f"the weight of {layer}", yours, reserved.weight)


def check_new_weights(given):
    for ratio in (0.1, 0.25, 0.5):
        for _ in range(5):
            cout, cin, k = whole(4, 40), whole(4, 40), whole(1, 6)
            reserved = cm.reserve_capacity(torch.nn.Conv2d(cin, cout, k), ratio)
            agree(f"new_weights({cout}, {cin}, {k}, {ratio})",
                  given.new_weights(cout, cin, k, ratio), reserved.A.numel() + reserved.B.numel())


def check_merged_state(given):
    model = small_unet(moved=True)
    ours = cm.merge(model).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yours = given.merged_state(model)
    missing, extra = sorted(ours.keys() - yours.keys()), sorted(yours.keys() - ours.keys())
    assert not missing, f"names that the plain network has and yours hasn't: {missing[:3]}"
    assert not extra, f"names that the plain network doesn't know: {extra[:3]}"
    for name in ours:
        agree(name, yours[name], ours[name])
    for name, value in model.state_dict().items():
        agree(f"{name} of the model, which should stay as it was", value, before[name])


def check_class_weights(given):
    for _ in range(5):
        counts = random_counts()
        yours = given.class_weights(counts)
        for name, mine, ours in zip(("omega_con", "omega_div"), yours, cm.class_weights(counts),
                                    strict=True):
            agree(f"{name} of the counts {counts}", mine, ours)


def check_turning_count(given):
    for _ in range(5):
        counts, w_div = random_counts(), uniform(0.1, 1)
        omega_con, omega_div = (omega[0].double() for omega in cm.class_weights(counts))
        # omega_con grows with N, omega_div falls: at N = counts[0] * x they are those times x, 1/x
        ours = counts[0] * (w_div * omega_div / omega_con).sqrt()
        agree(f"turning_count({counts}, {w_div:.2f})", given.turning_count(counts, w_div), ours)


def check_capacity_loss(given):
    w = torch.tensor([2.0, 0.7, 0.1, -0.3, -0.7, -0.1])
    far = torch.tensor([0.1, 2.0, 2.0, 2.0, 0.1, 0.4])[:, None, None, None]
    for _ in range(5):
        eps_theta = torch.randn(6, 3, 4, 4, requires_grad=True)
        eps_theta_g = (eps_theta + far * torch.randn(6, 3, 4, 4)).detach().requires_grad_()
        margin = uniform(0.05, 0.3)
        yours = given.capacity_loss(eps_theta, eps_theta_g, w, margin)
        ours = cm.capacity_loss(eps_theta, eps_theta_g, w, margin)
        agree("L_CM", yours, ours)
        for name, eps in (("eps_theta", eps_theta), ("eps_theta_g", eps_theta_g)):
            gradients = [torch.autograd.grad(loss.sum(), eps, retain_graph=True,
                                             allow_unused=True, materialize_grads=True)[0]
                         for loss in (yours, ours)]
            agree(f"the gradient in {name}", *gradients)


def check_curvature(given):
    for _ in range(5):
        counts, w_div, lam = random_counts(), uniform(0.1, 1), uniform(0.5, 2)
        w = cm.capacity_weights(counts, w_div=w_div)
        eps, eps_theta, eps_theta_g = torch.randn(3, len(w), 1, 1, 1, dtype=torch.float64)

        def loss(eps_theta, eps=eps, eps_theta_g=eps_theta_g, w=w, lam=lam):
            base = cm.squared_distance(eps_theta, eps)
            return (base + lam * cm.capacity_loss(eps_theta, eps_theta_g, w, math.inf)).sum()

        hessian = torch.autograd.functional.hessian(loss, eps_theta)
        ours = hessian.reshape(len(w), len(w)).diagonal()
        agree(f"curvature({counts}, {w_div:.2f}, {lam:.2f})",
              given.curvature(counts, w_div, lam), ours)


def check_concave_from(given):
    for num_classes, w_div in ((10, 0.2), (10, 1.0), (whole(12, 100), uniform(0.3, 0.9))):
        yours = given.concave_from(num_classes, w_div)
        what = f"concave_from({num_classes}, {w_div:.2f}) is {yours}"
        assert yours == int(yours), f"{what}, not a whole number"

        def least(ir, num_classes=num_classes, w_div=w_div):
            counts = [ir ** (-c / (num_classes - 1)) for c in range(num_classes)]
            return 1 + cm.capacity_weights(counts, w_div=w_div).min()

        assert least(yours) < 0, f"{what}, but there no class's curvature is below 0"
        assert least(yours - 1) >= 0, f"{what}, but one below it there is such a class already"


def drawn_references(x0, x_t, t, draws=4000):
    """[B, B]: how often cm.py's OC took image j as the reference of image i."""
    many = [x.repeat_interleave(draws, 0) for x in (x_t, t)]
    y, counts = torch.zeros_like(many[1]), torch.ones(1)  # one class: no reference is refused
    alpha_bar = cm.make_alpha_bar()
    target = cm.oc_target(x0, *many, y, torch.zeros_like(many[0]), counts, alpha_bar)
    signal_scale = alpha_bar[many[1]].sqrt().float()[:, None, None, None]
    noise_scale = (1 - signal_scale.square()).sqrt()
    reference = (many[0] - noise_scale * target) / signal_scale
    index = torch.cdist(reference.flatten(1), x0.flatten(1)).argmin(1).view(-1, draws)
    return torch.stack([(index == j).double().mean(1) for j in range(len(x0))], 1)


def check_reference_probabilities(given):
    alpha_bar = cm.make_alpha_bar()
    for _ in range(3):
        x0, eps = 2 * torch.rand(6, 1, 4, 4) - 1, torch.randn(6, 1, 4, 4)
        t = torch.randint(50, 900, (6,))
        x_t = cm.add_noise(x0, t, eps, alpha_bar)
        yours = given.reference_probabilities(x0, x_t, t, alpha_bar)
        assert yours.shape == (6, 6), "it should be [B, B], here [6, 6]"
        off = (yours.double() - drawn_references(x0, x_t, t)).abs().max()
        assert off < 0.04, f"cm.py drew them otherwise, by up to {off:.2f}, at t = {t.tolist()}"


def check_reference_shares(given):
    for t in (100, 300, 400, 500):
        x0, eps = 2 * torch.rand(12, 1, 4, 4) - 1, torch.randn(12, 1, 4, 4)
        y = torch.randint(3, (12,))
        times = torch.full_like(y, t)
        p = drawn_references(x0, cm.add_noise(x0, times, eps, cm.make_alpha_bar()), times)
        itself, same = torch.eye(12), (y[:, None] == y).double()
        ours = [(p * kind).sum(1).mean() for kind in (itself, same - itself, 1 - same)]
        yours = given.reference_shares(x0, y, eps, t)
        assert len(yours) == 3, "three numbers should be returned"
        for name, mine, drawn in zip(("the image itself", "its class", "another class"), yours,
                                     ours, strict=True):
            assert abs(mine - drawn) < 0.01, f"t = {t}, {name}: {mine:.3f}, cm.py drew {drawn:.3f}"


@torch.no_grad()
def check_two_distances(given):
    x_t, t = torch.randn(6, 1, 8, 8), torch.randint(cm.T, (6,))
    y = torch.randint(3, (6,))

    unet = small_unet(moved=False)
    yours = given.two_distances(unet, x_t, t, y)
    assert len(yours) == 2, "two tensors should be returned"
    assert (yours[0] > 0).all(), f"BA = 0, in training: d is {yours[0].tolist()}, not above 0"
    agree("d without dropout, BA = 0", yours[1], torch.zeros(6))
    assert unet.training, "the network came in training mode and didn't go so"

    unet = small_unet(moved=True)
    in_training, without_dropout = given.two_distances(unet, x_t, t, y)
    with cm.general_only(unet):
        theta_g = cm.merge(unet).eval()
    ours = cm.squared_distance(cm.merge(unet).eval()(x_t, t, y), theta_g(x_t, t, y))
    agree("d without dropout, BA moved", without_dropout, ours)
    assert in_training.mean() > ours.mean() / 2, "in training, too, d is between theta and theta_g"


def check_ddim_step(given):
    alpha_bar = cm.make_alpha_bar().tolist()
    for steps in (1, 7, 50):
        def predict(x, t):
            return torch.tanh(x.roll(1, -1)) + t / cm.T

        x = torch.randn(2, 3, 4, 4)
        ours = cm.ddim(predict, x, alpha_bar, steps)
        times = [i * cm.T // steps for i in reversed(range(steps))]
        after = [alpha_bar[t] for t in times[1:]] + [1.0]
        for t, a_next in zip(times, after, strict=True):
            x = given.ddim_step(x, predict(x, t), alpha_bar[t], a_next)
        agree(f"the image after {steps} of {steps} steps", x, ours)


def check_guided(given):
    alpha_bar = cm.make_alpha_bar()
    means = torch.cat([torch.rand(4, 3, 4, 4) - 0.5, torch.zeros(1, 3, 4, 4)])  # the last: no label

    def model(x, t, y):
        """The best prediction where a class's images are N(mean, 0.01)."""
        a = alpha_bar[t].float()[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * means[y]) / (0.01 * a + 1 - a)

    labels, seeds = torch.tensor([1, 0, 3, 2, 1]), range(5)
    noise = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds]
    for guidance in (0.0, uniform(0.2, 1), 1.5):
        def predict(x, t, guidance=guidance):
            return given.guided(model, x, torch.full_like(labels, t), labels, guidance)

        yours = cm.ddim(predict, torch.stack(noise), alpha_bar.tolist(), steps=10).clamp(-1, 1)
        ours = cm.sample(model, labels, (3, 4, 4), steps=10, guidance=guidance, seeds=seeds)
        agree(f"images of cm.sample at w = {guidance:.2f}", yours, ours)


def check_monte_carlo_pi_maj(given):
    trials = 10_000
    for _ in range(4):
        n1 = whole(8, 40)
        n2, cos, mu = whole(1, n1 // 2 + 1), uniform(-0.9, 0.9), uniform(0.5, 2)
        sigma = mu * (n1 - n2) / math.sqrt(n1 + n2)  # then Φ's argument is s, between 0.2 and 1
        ours = theory.pi_maj(n1 / (n1 + n2), n1 + n2, mu, sigma, cos)
        yours = given.monte_carlo_pi_maj(n1, n2, mu, sigma, cos, trials)
        z = abs(yours - ours) / theory.standard_error(ours, trials)
        assert z < 5, (f"n1 = {n1}, n2 = {n2}, cos = {cos:.2f}: yours {yours:.3f}, (F.7) "
                       f"{ours:.3f}, {z:.0f} standard errors apart")


def check_failing_means(given):
    for _ in range(5):
        counts, cos = [whole(500, 1000), whole(200, 500), whole(1, 5)], uniform(-0.5, 0.95)
        means = given.failing_means(counts, cos)
        assert np.shape(means)[:1] == (3,), "three means should be returned, [3, dim]"
        means = np.asarray(means, float)
        agree("the means' lengths", np.linalg.norm(means, axis=1), np.ones(3))
        agree("the cosine between the first and the last mean", means[0] @ means[2], cos)
        n = sum(counts)
        sigma = math.sqrt(n * (1 - cos) / 2)  # then (F.17) is Φ(1)
        exact = theory.pi_maj_multi(counts, means, sigma)
        bound = theory.pi_maj_multi_bound(0.0, n, 1.0, sigma, cos)
        assert exact > bound + 1e-6, f"(F.17) holds: it bounds {exact:.3f} by {bound:.3f}"


CHECKS = {name.removeprefix("check_"): check
          for name, check in list(globals().items()) if name.startswith("check_")}


# --------------------------------------------------------------------------------------------------
# Typical wrong answers, each refused by its check


WRONG = []


def wrong(name):
    """Register a wrong answer to the function of that name."""
    return lambda function: WRONG.append((name, function))


@wrong("reserved_weight")
def a_convolution_seen_as_kh_x_out(W_g, B, A):
    if W_g.ndim == 2:
        return W_g + B @ A
    cout, cin, kh, kw = W_g.shape
    return W_g + (B @ A).view(kh, cout, kw, cin).permute(1, 3, 0, 2)


@wrong("reserved_weight")
def without_W_g(W_g, B, A):
    return (B @ A).view_as(W_g)


@wrong("new_weights")
def rank_without_the_kernel(cout, cin, k, ratio):
    return max(int(ratio * min(cin, cout)), 1) * k * (cout + cin)


@wrong("new_weights")
def the_paper_s_shape_out_x_k_k_in(cout, cin, k, ratio):
    return k * max(int(ratio * min(cin, cout)), 1) * (cout + k * k * cin)


@wrong("merged_state")
def theta_g(model):
    with cm.general_only(model):
        return cm.merge(model).state_dict()


@wrong("merged_state")
def in_place(model):
    for layer in model.modules():
        if isinstance(layer, cm.LowRankReserved):
            layer.layer.weight.data += (layer.B @ layer.A).view_as(layer.layer.weight).detach()
    with cm.general_only(model):
        return cm.merge(model).state_dict()


@wrong("merged_state")
def names_of_the_reserved_network(model):
    return model.state_dict()


@wrong("class_weights")
def without_the_number_of_classes(counts):
    n = torch.tensor(counts).double()
    return n / n.sum(), (1 / n) / (1 / n).sum()


@wrong("class_weights")
def div_from_the_sum_of_counts(counts):
    n = torch.tensor(counts).double()
    return len(n) * n / n.sum(), n.sum() / (len(n) * n)


@wrong("turning_count")
def the_mean_count(counts, w_div):
    return sum(counts) / len(counts)


@wrong("turning_count")
def w_div_forgotten(counts, w_div):
    return solutions.turning_count(counts, 1.0)


@wrong("capacity_loss")
def without_the_fuse(eps_theta, eps_theta_g, w, div_margin):
    return solutions.capacity_loss(eps_theta, eps_theta_g, w, math.inf)


@wrong("capacity_loss")
def the_fuse_everywhere(eps_theta, eps_theta_g, w, div_margin):
    return w * (eps_theta - eps_theta_g).square().mean((1, 2, 3)).clamp(max=div_margin)


@wrong("capacity_loss")
def a_sum_over_pixels(eps_theta, eps_theta_g, w, div_margin):
    d = (eps_theta - eps_theta_g).square().sum((1, 2, 3))
    return torch.where(w < 0, w * d.clamp(max=div_margin), w * d)


@wrong("capacity_loss")
def theta_g_held_fixed(eps_theta, eps_theta_g, w, div_margin):
    return solutions.capacity_loss(eps_theta, eps_theta_g.detach(), w, div_margin)


@wrong("curvature")
def w_alone(counts, w_div, lam):
    return 2 * lam * cm.capacity_weights(counts, w_div=w_div)


@wrong("curvature")
def without_lambda(counts, w_div, lam):
    return 2 * (1 + cm.capacity_weights(counts, w_div=w_div))


@wrong("concave_from")
def the_last_convex_one(num_classes, w_div):
    return solutions.concave_from(num_classes, w_div) - 1


@wrong("concave_from")
def where_w_turns_negative(num_classes, w_div):
    return 2


@wrong("reference_probabilities")
def x_t_not_scaled_back(x0, x_t, t, alpha_bar):
    a = alpha_bar[t][:, None]
    distance = torch.cdist(x_t.flatten(1), x0.flatten(1)).square()
    return (-distance / (2 * (1 / a - 1))).softmax(1)


@wrong("reference_probabilities")
def a_mean_over_pixels(x0, x_t, t, alpha_bar):
    a = alpha_bar[t][:, None]
    distance = torch.cdist(x_t.flatten(1) / a.sqrt(), x0.double().flatten(1)).square()
    return (-distance / x0[0].numel() / (2 * (1 / a - 1))).softmax(1)


@wrong("reference_probabilities")
def over_the_wrong_axis(x0, x_t, t, alpha_bar):
    a = alpha_bar[t][:, None]
    distance = torch.cdist(x_t.flatten(1) / a.sqrt(), x0.double().flatten(1)).square()
    return (-distance / (2 * (1 / a - 1))).softmax(0)


@wrong("reference_shares")
def the_sample_itself_excluded(x0, y, eps, t):
    itself, same, other = solutions.reference_shares(x0, y, eps, t)
    return 0.0, same / (1 - itself), other / (1 - itself)


@wrong("reference_shares")
def its_class_with_itself(x0, y, eps, t):
    itself, same, other = solutions.reference_shares(x0, y, eps, t)
    return itself, same + itself, other


@wrong("two_distances")
def theta_twice(unet, x_t, t, y):
    in_training = cm.squared_distance(unet(x_t, t, y), unet(x_t, t, y))
    unet.eval()
    without_dropout = cm.squared_distance(unet(x_t, t, y), unet(x_t, t, y))
    unet.train()
    return in_training, without_dropout


@wrong("two_distances")
def the_switch_left_off(unet, x_t, t, y):
    distances = solutions.two_distances(unet, x_t, t, y)
    unet.eval()
    return distances


@wrong("two_distances")
def the_switch_before_both(unet, x_t, t, y):
    _, without_dropout = solutions.two_distances(unet, x_t, t, y)
    return without_dropout, without_dropout


@wrong("ddim_step")
def scales_without_roots(x, eps, a, a_next):
    x0 = (x - (1 - a) * eps) / a
    return a_next * x0 + (1 - a_next) * eps


@wrong("ddim_step")
def fresh_noise(x, eps, a, a_next):
    x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return a_next**0.5 * x0 + (1 - a_next) ** 0.5 * torch.randn_like(x)


@wrong("guided")
def the_other_convention(model, x, t, labels, guidance):
    eps_null = model(x, t, torch.full_like(labels, -1))
    return eps_null + guidance * (model(x, t, labels) - eps_null)


@wrong("guided")
def class_0_for_no_label(model, x, t, labels, guidance):
    eps = model(x, t, labels)
    return eps + guidance * (eps - model(x, t, torch.zeros_like(labels)))


@wrong("monte_carlo_pi_maj")
def one_gradient_a_class(n1, n2, mu, sigma, cos, trials):
    means = theory.two_means(mu, cos, 2)
    g = means + sigma * np.random.standard_normal((trials, 2, 2))
    return ((n1 * g[:, 0] + n2 * g[:, 1]) @ (means[0] - means[1]) > 0).mean()


@wrong("monte_carlo_pi_maj")
def along_the_majority_s_mean(n1, n2, mu, sigma, cos, trials):
    means = theory.two_means(mu, cos, 2)
    noise = sigma * math.sqrt(n1 + n2) * np.random.standard_normal((trials, 2))
    return ((n1 * means[0] + n2 * means[1] + noise) @ means[0] > 0).mean()


@wrong("failing_means")
def orthogonal_to_both(counts, cos):
    first, last = theory.two_means(1.0, cos, 3)
    return np.stack([first, np.array([0, 0, 1]), last])


@wrong("failing_means")
def a_longer_second_mean(counts, cos):
    first, second, last = solutions.failing_means(counts, cos)
    return np.stack([first, 3 * second, last])


@wrong("failing_means")
def towards_the_last_class(counts, cos):
    first, second, last = solutions.failing_means(counts, cos)
    return np.stack([first, -second, last])


# --------------------------------------------------------------------------------------------------
# The tests


def not_written(name):
    return pytest.mark.skipif(not answers.written(getattr(answers, name)), reason="not written yet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=not_written(name)) for name in CHECKS])
def test_answer(name):
    torch.manual_seed(0)
    CHECKS[name](answers)


@pytest.mark.parametrize("name", CHECKS)
def test_solution(name):
    torch.manual_seed(0)
    CHECKS[name](solutions)


@pytest.mark.parametrize("name, answer", [
    pytest.param(*pair, id=pair[1].__name__) for pair in WRONG])
def test_wrong_answer_is_refused(name, answer):
    torch.manual_seed(0)
    np.random.seed(0)
    with pytest.raises(AssertionError):
        CHECKS[name](types.SimpleNamespace(**{name: answer}))


def test_every_answer_has_a_check_a_wrong_one_and_a_solution():
    """In the README's order, with the same arguments."""
    asked = [name for name, value in vars(answers).items() if name in CHECKS
             or inspect.isfunction(value) and not answers.written(value)]  # else a helper
    assert asked == list(CHECKS)
    assert set(asked) == {name for name, _ in WRONG}
    for name in asked:
        theirs, ours = (inspect.signature(getattr(module, name)) for module in (answers, solutions))
        assert list(theirs.parameters) == list(ours.parameters)
