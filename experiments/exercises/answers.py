"""Your answers: README.md has the tasks, `python -m pytest experiments/exercises` the verdicts.

Replace the body of a function; its docstring says what goes in and out. [B, C, H, W] are images,
else C is the number of classes. Use cm.py's functions where an earlier answer isn't right yet.
"""


def written(function):
    """Is the `raise` gone that this file came with? Until then the function isn't checked."""
    return "NotImplementedError" not in function.__code__.co_names


# --------------------------------------------------------------------------------------------------
# Eq. (1): capacity


def reserved_weight(W_g, B, A):
    """Task 1. W_g + BA in W_g's own shape.

    W_g [out, in, kh, kw] of a convolution or [out, in] of a linear layer; B [kh * out, r] and
    A [r, kw * in] (a linear layer has kh = kw = 1)."""
    raise NotImplementedError


def new_weights(cout, cin, k, ratio):
    """Task 1. How many weights B and A add to a k x k convolution, an int.

    From cin to cout channels; their rank is k * max(int(ratio * min(cin, cout)), 1)."""
    raise NotImplementedError


def merged_state(model):
    """Task 2. The weights of `model`, a module with `cm.LowRankReserved` layers inside, as a plain
    network of the same kind would load them: a dict {name: tensor}. `model` stays as it is."""
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Eqs. (3) and (2): the loss


def class_weights(counts):
    """Task 3. (omega_con, omega_div), each [C], of training counts [C] (a list of ints)."""
    raise NotImplementedError


def turning_count(counts, w_div):
    """Task 4. The number of training images at which a class would have w = 0: a float.

    counts [C] are all classes' training counts, w = omega_con - w_div * omega_div."""
    raise NotImplementedError


def capacity_loss(eps_theta, eps_theta_g, w, div_margin):
    """Task 5. L_CM [B] of two predictions [B, C, H, W] and each sample's w [B], with the fuse."""
    raise NotImplementedError


def curvature(counts, w_div, lam):
    """Task 6. Each class's curvature of base loss + lam * L_CM in eps_theta, [C], for counts [C].

    Of an image of one pixel; without the fuse."""
    raise NotImplementedError


def concave_from(num_classes, w_div):
    """Task 6. The smallest whole imbalance ratio at which a class's curvature is below 0 (lam = 1).

    Counts fall from class to class by one factor, N_c = IR^(-c / (C - 1)), and needn't be whole."""
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Base losses and the training step


def reference_probabilities(x0, x_t, t, alpha_bar):
    """Task 7. [B, B]: the probability that OC takes image j as the reference of image i (Eq. D.4).

    x0, x_t [B, C, H, W]; t [B]; alpha_bar [T]."""
    raise NotImplementedError


def reference_shares(x0, y, eps, t):
    """Task 7. The probabilities, means over a batch noised to the time t (an int), that a reference
    is the image itself, another one of its class, one of another class: three numbers, sum 1.

    x0, eps [B, C, H, W]; y [B]."""
    raise NotImplementedError


def two_distances(unet, x_t, t, y):
    """Task 8. (d as training sees it, d without dropout), each [B].

    `unet(x_t, t, y)` has reserved capacity and comes and goes in training mode; x_t [B, C, H, W];
    t, y [B]."""
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Sampling


def ddim_step(x, eps, a, a_next):
    """Task 9. The image [B, C, H, W] one DDIM step (eta = 0) after x [B, C, H, W].

    eps [B, C, H, W] is the network's prediction at x; a and a_next, floats, are alpha_bar now and
    after the step."""
    raise NotImplementedError


def guided(model, x, t, labels, guidance):
    """Task 10. The guided prediction [B, C, H, W] of `model(x, t, labels)`.

    x [B, C, H, W]; t, labels [B]; guidance is w, a float; the label -1 stands for none."""
    raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Theory


def monte_carlo_pi_maj(n1, n2, mu, sigma, cos, trials):
    """Task 11. Theorem 2.1's probability as a share of `trials` simulated updates: a float.

    Class 1 sends n1 gradients, class 2 n2; mu is the length of both means, cos the cosine of the
    angle between them, sigma the standard deviation of each coordinate."""
    raise NotImplementedError


def failing_means(counts, cos):
    """Task 12. Three class means [3, dim] of length 1 for which (F.17) fails at alpha = 0.

    counts [3] fall, the last one far below the second; cos is the cosine of the angle between the
    first and the last mean, between -0.5 and 0.95."""
    raise NotImplementedError
