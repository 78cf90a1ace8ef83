"""Methods that precondition a matrix from both sides, by a Kronecker product: Shampoo, CASPR, SOAP, Kron."""

import math
import random
from itertools import compress

import torch
from torch import Tensor

from optimizers.base import BETA1, BETA2, DECAY, EPS, LR, hyper
from optimizers.matrix import RATE, SCALES, WD, Block, MatrixMethod, frobenius, orthogonalize


def inverse_root(A: Tensor, exponent: float, eps: float, old: Tensor, relative: bool = False) -> Tensor:
    """(A + eps I)^-exponent of symmetric positive semi-definite [k, n, n], in fp64 inside; `old` where that fails. The factors
    of a gradient with fewer columns than rows are singular: eigenvalues that rounding made negative are raised to 0 before eps
    (relative to the largest) is added, as in distributed_shampoo."""
    try:
        values, vectors = torch.linalg.eigh(A.double())
    except torch.linalg.LinAlgError:  # one matrix of the batch did not converge
        return old
    values = values - values[:, :1].clamp(max=0)
    values = values + eps * (values[:, -1:].clamp(min=1e-30) if relative else 1)
    root = ((vectors * values.pow(-exponent).unsqueeze(-2)) @ vectors.mT).to(old.dtype)
    return torch.where(root.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), root, old)


def at_norm(u: Tensor, graft: Tensor) -> Tensor:
    """Grafting (arXiv 2002.11803): each u [k, m, n] at the norm of its graft; the graft itself where u is zero."""
    size = frobenius(u)
    return torch.where(size > 0, u * (frobenius(graft) / size.clamp(min=1e-30)), graft)


class Kronecker(MatrixMethod):
    """What they share: the size of blocks, and what one costs."""

    block = hyper(1024, "largest side of a block; 0: whole matrices")

    products, renewal = 1, 0  # operations of a step in m n (m + n), and of renewing roots or bases in m^3 + n^3

    def cost(self, m, n):
        return self.products * m * n * (m + n) + self.renewal * (m**3 + n**3) / self.defaults.get("every", 1)


class Shampoo(Kronecker):
    """L <- b2 L + (1 - b2) g g^T;  R <- b2 R + (1 - b2) g^T g;  u = L^^-e m^ R^^-e, at the norm of Adam's update of the same
    block;  w <- (1 - lr wd) w - lr u.

    Source: arXiv 1802.09568; grafting, blocks and averages as in distributed_shampoo (arXiv 2309.06497,
    github.com/facebookresearch/optimizers). Roots are renewed every `every` steps; before `start` the update is Adam's.
    e = 1/4 is the paper's; 1/2 makes each side K-FAC-like. `one_sided` preconditions the shorter side alone, with 2 e. Grafting
    `rms`: the root mean square of u is 0.04 sqrt(rows / 768), with e = 1/3 (modded-nanogpt pull request #327)."""

    lr, beta1 = LR(6e-3, 3e-4, 3e-2, RATE), BETA1(0.9, help="average of gradients; 0: none")
    beta2 = BETA2(0.95, help="average of the factors, and of the squares of grafting")
    eps, weight_decay = EPS(1e-12, "added to the factors' eigenvalues (above 1e-8 it hurts)"), DECAY(0.05, help=WD)
    exponent = hyper(0.25, "e, of each side", (0.125, 0.5, "linear"))
    one_sided = hyper(False, "precondition the shorter side only")
    every = hyper(10, "steps between renewals of the roots", least=1)
    start: float = hyper(10, "first step that is preconditioned; below 1: fraction of the run")
    grafting = hyper("adam", "size of the update: adam, none (its own), or rms", choices=("adam", "none", "rms"))
    graft_eps = EPS(help="floor of Adam's denominator in grafting")
    state_per_parameter, renewal = 24.0, 10

    def initial(self, group, m, n):
        state = {"average": torch.zeros(m, n)} if group["beta1"] else {}
        if group["grafting"] == "adam":
            state["squares"] = torch.zeros(m, n)
        for side, size in self.sides(group, m, n):
            state |= {side: torch.zeros(size, size), f"{side}_root": torch.eye(size)}
        return state

    def sides(self, group, m, n) -> list[tuple[str, int]]:
        """Name and size of each factor."""
        both = [("left", m), ("right", n)]
        return [min(both, key=lambda side: side[1])] if group["one_sided"] else both

    def update(self, group, state, G, blocks):
        t, beta1, beta2 = group["t"], group["beta1"], group["beta2"]
        sides = self.sides(group, *G.shape[-2:])
        for side, _ in sides:
            X = G if side == "left" else G.mT
            state[side].baddbmm_(X, X.mT, beta=beta2, alpha=1 - beta2)
        m = state["average"].lerp_(G, 1 - beta1) / (1 - beta1**t) if beta1 else G
        graft = None
        if group["grafting"] == "adam":
            v = state["squares"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
            graft = m / ((v / (1 - beta2**t)).sqrt_() + group["graft_eps"])
            if t < group["start"]:
                return graft
        first = max(1, group["start"]) if group["grafting"] == "adam" else 1
        if t == first or t % group["every"] == 0:
            power = group["exponent"] * (2 if group["one_sided"] else 1)
            for side, _ in sides:
                root = state[side + "_root"]
                root.copy_(inverse_root(state[side] / (1 - beta2**t), power, group["eps"], root))
        u = torch.bmm(state["left_root"], m) if "left_root" in state else m
        u = torch.bmm(u, state["right_root"]) if "right_root" in state else u
        if group["grafting"] == "rms":
            return u * (0.04 * math.sqrt(G.size(-2) / 768 * G[0].numel()) / frobenius(u).clamp(min=1e-30))
        return u if graft is None else at_norm(u, graft)


class CASPR(Kronecker):
    """L <- b2 L + (1 - b2) g g^T;  R <- b2 c R + (1 - b2) (P g)^T (P g) / rows;  u = P m~ Q with P = L^-1/2, Q = R^-1/2 and
    m~ NAdam's average, at the norm of NAdam's update;  w <- (1 - lr wd) w - lr u.

    Source: "CASPR Adaptive" of AlgoPerf's first round (algorithms_results_v0.5, team 16): R is of gradients that the left
    side has already preconditioned, and c = tr(P L_before P) / rows adapts it to a new P. CASPR itself: Duvvuri et al.,
    ICLR 2024. Up to `start` the update is NAdam's. The norm is the block's here, the whole weight's there."""

    lr, beta1 = LR(3e-3, help=RATE), BETA1(0.9)
    beta2 = BETA2(0.95, help="average of the factors, and of the squares of grafting")
    eps = hyper(1e-6, "added to the factors, relative to their largest eigenvalue", (1e-8, 1e-4, "log"))
    weight_decay = DECAY(0.05, help=WD)
    every = hyper(10, "steps between renewals of the roots", least=1)
    start: float = hyper(10, "last step that is not preconditioned; below 1: fraction of the run")
    graft_eps = EPS(help="floor of NAdam's denominator")
    state_per_parameter, products, renewal = 28.0, 3, 10

    def initial(self, group, m, n):
        left, right = torch.eye(m), torch.eye(n)
        state = {"average": torch.zeros(m, n), "squares": torch.zeros(m, n)}
        state |= {"left": group["eps"] * left, "left_before": group["eps"] * left, "left_root": left}
        return state | {"right": right, "right_root": right}

    def update(self, group, state, G, blocks):
        t, beta1, beta2, rows = group["t"], group["beta1"], group["beta2"], G.size(-2)
        left, right, P, Q = (state[name] for name in ("left", "right", "left_root", "right_root"))
        if t > 1 and (t - 1) % group["every"] == 0:  # P was renewed in the step before
            before = state["left_before"]
            ridge = group["eps"] * torch.linalg.eigvalsh(before)[:, -1:].unsqueeze(-1)
            fit = (torch.bmm(P, before) * P).sum((-2, -1), keepdim=True) + ridge * P.square().sum((-2, -1), keepdim=True)
            right.mul_(fit / rows)
            before.copy_(left)
        PG = torch.bmm(P, G)
        left.baddbmm_(G, G.mT, beta=beta2, alpha=1 - beta2)
        right.baddbmm_(PG.mT, PG, beta=beta2, alpha=(1 - beta2) / rows)
        m = state["average"].lerp_(G, 1 - beta1)
        m = torch.lerp(G, m, beta1) / (1 - beta1**t)
        v = state["squares"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        graft = m / ((v / (1 - beta2**t)).sqrt_() + group["graft_eps"])
        if t % group["every"] == 0:
            for factor, root in ((left, P), (right, Q)):
                root.copy_(inverse_root(factor, 0.5, group["eps"], root, relative=True))
        if t <= group["start"]:
            return graft
        return at_norm(torch.bmm(torch.bmm(P, m), Q), graft)


class SOAP(Kronecker):
    """Adam in the eigenbasis of Shampoo's factors: g' = Q_L^T g Q_R;  m, v of g' as Adam's;
    u = Q_L (m^ / (sqrt(v^) + eps)) Q_R^T;  w <- (1 - lr wd) w - lr u;  then L, R as Shampoo's and, every `every` steps,
    Q <- QR(L Q).

    Source: arXiv 2409.11321, github.com/nikhilvyas/SOAP. The first step only starts the factors and their bases. When a basis
    turns, m turns with it and v stays, its rows sorted by eigenvalue. A block starts at its first gradient other than zero. The
    source starts at the very first; if that is zero the bases start as the identity, which QR steps leave only slowly.
    `polar`: u is orthogonalised (SOAP-Muon, modded-nanogpt's optimizer track #14). `kl` (KL-SOAP, arXiv 2509.03378): L, R as
    KL-Shampoo's, L <- b L + (1 - b) g R^-1 g^T / columns, R likewise; R^-1 by the basis, eigenvalues + 0.001 of the largest."""

    lr, beta1 = LR(6e-3, 3e-4, 3e-2, RATE), BETA1(0.95)
    beta2, shampoo_beta = BETA2(0.95, help="average of squares in the basis"), BETA2(0.95, help="average of the factors")
    eps, weight_decay = EPS(), DECAY(0.01, 1e-3, 1.0, WD)
    every = hyper(10, "steps between renewals of the bases", least=1)
    polar, kl = hyper(False, "orthogonalise the update"), hyper(False, "KL-Shampoo's factors")
    state_per_parameter, products, renewal = 24.0, 4, 4

    def initial(self, group, m, n):
        sizes = {"average": (m, n), "squares": (m, n), "steps": ()}  # steps: since the bases were started, that one included
        sizes |= {"left": (m, m), "left_basis": (m, m), "right": (n, n), "right_basis": (n, n)}
        return {name: torch.zeros(size) for name, size in sizes.items()}

    def _link(self) -> None:
        super()._link()
        self._started: set[int] = set()  # blocks whose bases are known to stand: to ask the device again is to wait for it

    def starting(self, state: dict[str, Tensor], G: Tensor, blocks: list[Block]) -> list[int]:
        """Places of the blocks that have their first gradient other than zero."""
        ids = [b.id for b in blocks]
        unknown = [k for k, i in enumerate(ids) if i not in self._started]
        if not unknown or G.is_meta:
            return []
        stands = state["steps"][unknown] > 0
        moves = (G[unknown].flatten(1).abs().amax(1) > 0) & ~stands
        moves, stands = torch.stack([moves, stands]).tolist()
        self._started |= {ids[k] for k, *either in zip(unknown, moves, stands, strict=True) if any(either)}
        return list(compress(unknown, moves))

    def update(self, group, state, G, blocks):
        t, beta1, beta2, shampoo_beta = (group[key] for key in ("t", "beta1", "beta2", "shampoo_beta"))
        m, v, steps = state["average"], state["squares"], state["steps"]
        left, right = state["left_basis"], state["right_basis"]  # zero before they are started, and so is all that follows
        rotated = torch.bmm(torch.bmm(left.mT, G), right)
        m.lerp_(rotated, 1 - beta1)
        v.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        d = v.sqrt().add_(group["eps"])
        shares = [-torch.expm1(steps.clamp(min=1) * math.log(max(beta, 1e-38))) for beta in (beta1, beta2)]
        u = torch.bmm(torch.bmm(left, m / d), right.mT).mul_((shares[1].sqrt() / shares[0])[:, None, None])
        if group.get("polar"):
            u = orthogonalize(u, 12, "cubic").float() * SCALES["keller"](*G.shape[-2:])
        across, down = self.whitened(state, G) if group.get("kl") else (G, G)
        state["left"].baddbmm_(across, across.mT, beta=shampoo_beta, alpha=1 - shampoo_beta)
        state["right"].baddbmm_(down.mT, down, beta=shampoo_beta, alpha=1 - shampoo_beta)
        if t > 1 and (t - 1) % group["every"] == 0:  # the first step, which only starts the bases, does not count
            self.turn(state)
        steps.add_(steps > 0)
        if starting := self.starting(state, G, blocks):
            for side in ("left", "right"):
                state[side + "_basis"][starting] = torch.linalg.eigh(state[side][starting])[1].flip(-1)
            steps[starting] = 1
        return u

    @staticmethod
    def whitened(state: dict[str, Tensor], G: Tensor) -> tuple[Tensor, Tensor]:
        """G R^-1/2 / sqrt(columns) and L^-1/2 G / sqrt(rows), up to a rotation; G itself in blocks that have not started."""
        new, made = (state["steps"] == 0)[:, None, None], []
        for side, X in (("right", G), ("left", G.mT)):
            basis = state[side + "_basis"]
            values = (basis * torch.bmm(state[side], basis)).sum(1, keepdim=True)  # [k, 1, size]
            floor = 1e-3 * values.amax(-1, keepdim=True).clamp(min=1e-30)
            X = torch.where(new, X, torch.bmm(X, basis) / ((values + floor) * X.size(-1)).sqrt())
            made.append(X)
        return made[0], made[1].mT

    def turn(self, state):
        """One step of orthogonal iteration on each basis, columns sorted by the eigenvalues that they estimate."""
        m, v = state["average"], state["squares"]
        for side, dim in (("left", 1), ("right", 2)):
            factor, old = state[side], state[side + "_basis"]
            product = torch.bmm(factor, old)
            order = (old * product).sum(1).argsort(-1, descending=True)  # diagonal of Q^T L Q, [k, size]
            new = torch.linalg.qr(product.take_along_dim(order.unsqueeze(1), 2))[0]
            v.copy_(v.take_along_dim(order.unsqueeze(3 - dim), dim))
            back = torch.bmm(new.mT, old)  # from the old basis into the new one
            m.copy_(torch.bmm(back, m) if dim == 1 else torch.bmm(m, back.mT))
            old.copy_(new * (state["steps"] > 0)[:, None, None])  # zero still where it was not started


class Kron(Kronecker):
    """m <- b1 m + (1 - b1) g;  u = Q_L^T Q_L m^ Q_R^T Q_R, its root mean square at most 1.1;  w <- (1 - lr wd) w - lr u;
    first, with a probability that falls from 1 to `least_probability`: A = Q_L m^ Q_R^T, B = Q_L^-T V Q_R^-1, V ~ N(0, 1),
    Q_L <- Q_L - rate triu(A A^T - B B^T) Q_L / |A A^T + B B^T|, Q_R likewise with A^T A, B^T B.

    Source: PSGD, arXiv 1512.04202; github.com/evanatyourservice/kron_torch. Q are upper triangular; |.|: `norm_lower_bound`."""

    lr, beta1, weight_decay = LR(3e-3, 1e-4, 1e-2, RATE), BETA1(0.9), DECAY(0.5, 0.1, 3.0, WD)
    rate = hyper(0.1, "step of Q", (0.03, 0.3, "log"))
    flat = hyper(500, "steps at probability 1; then it falls by exp(-0.001 a step)")
    least_probability = hyper(0.03, "of renewing Q in a step", (0.01, 1.0, "log"))
    scale = hyper(1.0, "first Q_L and Q_R: the root of this, times the identity")
    clip = hyper(1.1, "largest root mean square of an update; 0: none")
    state_per_parameter, products = 12.0, 6

    def initial(self, group, m, n):
        scale = math.sqrt(group["scale"])
        return {"average": torch.zeros(m, n), "left": scale * torch.eye(m), "right": scale * torch.eye(n)}

    def update(self, group, state, G, blocks):
        t, beta1 = group["t"], group["beta1"]
        m = state["average"].lerp_(G, 1 - beta1) / (1 - beta1**t)
        left, right = state["left"], state["right"]
        dice = random.Random(t)
        if dice.random() < max(group["least_probability"], math.exp(-0.001 * (t - 1 - group["flat"]))):
            if dice.random() < 0.01:  # keeps the two sides at one size; their product stays
                sizes = left.abs().amax((-2, -1), keepdim=True), right.abs().amax((-2, -1), keepdim=True)
                left.mul_((sizes[1] / sizes[0]).sqrt())
                right.mul_((sizes[0] / sizes[1]).sqrt())
            A = torch.bmm(torch.bmm(left, m), right.mT)
            B = torch.linalg.solve_triangular(left.mT, self.probe(m, t, [b.id for b in blocks]), upper=False)
            B = torch.linalg.solve_triangular(right, B, upper=True, left=False)
            for Q, X, Y in ((left, A, B), (right, A.mT, B.mT)):  # towards E[(Q^T Q) g g^T] = 1
                one, two = torch.bmm(X, X.mT), torch.bmm(Y, Y.mT)
                step = group["rate"] / (norm_lower_bound(one + two) + torch.finfo(torch.bfloat16).tiny)
                Q.sub_(torch.bmm((one - two).triu() * step, Q))
        u = torch.bmm(left.mT, torch.bmm(left, torch.bmm(torch.bmm(m, right.mT), right)))
        if not group["clip"]:
            return u
        return u * (group["clip"] / (u.square().mean((-2, -1), keepdim=True).sqrt() + 1e-30)).clamp(max=1)

    @staticmethod
    def probe(m: Tensor, t: int, ids: list[int]) -> Tensor:
        """Normal numbers [k, m, n]; a block's depend only on its id and the step."""
        V = torch.empty_like(m)
        if V.is_meta:  # a dry run: shapes alone
            return V
        generator = torch.Generator(m.device)
        for row, block in zip(V, ids, strict=True):
            row.normal_(generator=generator.manual_seed(t * 1_000_003 + block))
        return V


def norm_lower_bound(A: Tensor) -> Tensor:
    """A lower bound of the spectral norms of symmetric [k, n, n], as [k, 1, 1]: |A x|, x the largest row through A once."""
    most = A.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
    A = A / most
    row = A.take_along_dim(A.square().sum(-1, keepdim=True).argmax(1, keepdim=True), 1)  # [k, 1, n]
    x = torch.bmm(row, A)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-30)
    return most * torch.linalg.vector_norm(torch.bmm(x, A), dim=-1, keepdim=True)
