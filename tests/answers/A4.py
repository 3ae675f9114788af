# ruff: noqa
# Answers to assignment A4, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.
# `# -` and `# +` lines are the solution with these lines out and in.

# wrong [keys-of-check]: the keys stay in shuffled order
def keys_of(f_k, view, order):
    with torch.no_grad():
        return F.normalize(f_k(view[order]), dim=1)


# wrong [keys-of-check]: shuffled twice
def keys_of(f_k, view, order):
    with torch.no_grad():
        return F.normalize(f_k(view[order]), dim=1)[order]


# wrong [keys-of-check]: a gradient flows into f_k
def keys_of(f_k, view, order):
    return F.normalize(f_k(view[order]), dim=1)[torch.argsort(order)]


# wrong [keys-of-check]: not shuffled at all
def keys_of(f_k, view, order):
    with torch.no_grad():
        return F.normalize(f_k(view), dim=1)


# wrong [keys-of-check]: normalised over the images
def keys_of(f_k, view, order):
    with torch.no_grad():
        return F.normalize(f_k(view[order])[torch.argsort(order)], dim=0)


# wrong [keys-of-hidden]: encoded one by one, so that nothing is shared within a part of the batch
def keys_of(f_k, view, order):
    with torch.no_grad():
        f_k(view[order])
        return torch.cat([F.normalize(f_k(image[None]), dim=1) for image in view])


# wrong [moco-step-check]: enqueued before the loss
# - k = F.normalize(f_k(view_k), dim=1)
# + k = F.normalize(f_k(view_k), dim=1)
# + queue[(pointer + torch.arange(N)) % K] = k
# - queue[rows[-K:]] = k[-K:]

# wrong [moco-step-check]: queries are enqueued
# - queue[rows[-K:]] = k[-K:]
# + queue[rows[-K:]] = q.detach()[-K:]

# wrong [moco-step-check]: the momentum update comes before the optimizer's step
# - theta_k.mul_(m).add_(theta_q, alpha=1 - m)
# + pass
# - k = F.normalize(f_k(view_k), dim=1)
# + k = F.normalize(f_k(view_k), dim=1)
# + for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
# +     theta_k.mul_(m).add_(theta_q, alpha=1 - m)

# wrong [moco-step-check]: gradients add up
# - optimizer.zero_grad()

# wrong [moco-step-check]: right only where K is a multiple of N
# - queue[rows[-K:]] = k[-K:]
# + queue[pointer : pointer + N] = k[: K - pointer]

# wrong [moco-step-check]: the temperature on the positive only
# - logits = torch.cat([positive, q @ queue.T], dim=1) / temperature
# + logits = torch.cat([positive / temperature, q @ queue.T], dim=1)

# wrong [moco-step-check]: the momentum update the wrong way round
# - theta_k.mul_(m).add_(theta_q, alpha=1 - m)
# + theta_k.mul_(1 - m).add_(theta_q, alpha=m)

# wrong [moco-step-hidden]: gradient through the keys
# - k = F.normalize(f_k(view_k), dim=1)
# + with torch.enable_grad():
# +     k = F.normalize(f_k(view_k), dim=1)

# wrong [moco-step-hidden]: a momentum of 0.7, whatever m is
# - theta_k.mul_(m).add_(theta_q, alpha=1 - m)
# + theta_k.mul_(0.7).add_(theta_q, alpha=0.3)

# wrong [train-check]: f_k is f_q
# - f_k = deepcopy(f_q).requires_grad_(False)
# + f_k = f_q

# wrong [train-check]: the same crops in each epoch
# - view_q, view_k = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
# + view_q, view_k = two_views(images[index], index, "shapes", seed=seed)

# wrong [train-check]: the learning rate stays
# - group["lr"] = 0.12 * 0.5 * (1 + math.cos(math.pi * step / steps))
# + group["lr"] = 0.12

# wrong [train-check]: the first queue is not normalised
# - queue, pointer = F.normalize(torch.randn(256, f_q.dim), dim=1), 0
# + queue, pointer = torch.randn(256, f_q.dim), 0

# wrong [train-check]: the pointer is thrown away
# - loss, pointer = moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, 0.99, 0.1)
# + loss, _ = moco_step(f_q, f_k, queue, 0, view_q, view_k, optimizer, 0.99, 0.1)

# wrong [train-check]: the same order in each epoch
# - order = torch.randperm(len(images))
# + order = torch.arange(len(images))


# right: in other words
def keys_of(f_k, view, order):
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    k = f_k(view.index_select(0, order)).detach()
    return F.normalize(k, dim=1).index_select(0, back)


def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    optimizer.zero_grad(set_to_none=True)
    k = F.normalize(f_k(view_k).detach(), dim=-1)
    q = F.normalize(f_q(view_q), dim=-1)
    l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    l_neg = torch.einsum("nc,kc->nk", q, queue.clone())
    logits = torch.cat([l_pos, l_neg], dim=1).div(temperature)
    loss = -logits.log_softmax(dim=1)[:, 0].mean()
    loss.backward()
    optimizer.step()
    for theta_q, theta_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
        theta_k.data = theta_k.data * m + theta_q.data * (1 - m)
    for key in k:
        queue[pointer] = key
        pointer = (pointer + 1) % len(queue)
    return float(loss.detach()), pointer


def batches_of(n, steps):
    done = 0
    for epoch in range(10**6):
        for index in torch.randperm(n)[: n // 64 * 64].view(-1, 64):
            if done == steps:
                return
            done += 1
            yield epoch, index


def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = deepcopy(f_q)
    for parameter in f_k.parameters():
        parameter.requires_grad = False
    queue = F.normalize(torch.randn(256, 128), dim=1)
    pointer, history = 0, []
    optimizer = torch.optim.SGD(list(f_q.parameters()), lr=0.12, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch, index in batches_of(len(images), steps):
        views = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
        loss, pointer = moco_step(f_q, f_k, queue, pointer, *views, optimizer, m=0.99, temperature=0.1)
        history.append(loss)
        schedule.step()
    return f_q, history


# right: helpers in functions of their own
def unit(x):
    return x / x.norm(dim=1, keepdim=True)


@torch.no_grad()
def keys_of(f_k, view, order):
    k = unit(f_k(view[order]))
    out = torch.empty_like(k)
    out[order] = k
    return out


@torch.no_grad()
def follow(f_k, f_q, m):
    for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
        theta_k.lerp_(theta_q, 1 - m)


def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    with torch.no_grad():
        k = unit(f_k(view_k))
    q = unit(f_q(view_q))
    similarity = q @ torch.cat([k, queue]).T / temperature
    own = similarity.diagonal()
    others = similarity[:, len(k) :]
    loss = (torch.cat([own[:, None], others], dim=1).logsumexp(dim=1) - own).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    follow(f_k, f_q, m)
    for n in range(len(k)):
        queue[(pointer + n) % len(queue)] = k[n]
    return loss.item(), (pointer + len(k)) % len(queue)
