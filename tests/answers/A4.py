# ruff: noqa
# Answers to assignment A4, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.

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
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
        queue[(pointer + torch.arange(N)) % K] = k
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
    return loss.item(), (pointer + N) % K


# wrong [moco-step-check]: queries are enqueued
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
        queue[(pointer + torch.arange(N)) % K] = q.detach()
    return loss.item(), (pointer + N) % K


# wrong [moco-step-check]: the momentum update comes before the optimizer's step
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    queue[(pointer + torch.arange(N)) % K] = k
    return loss.item(), (pointer + N) % K


# wrong [moco-step-check]: gradients add up
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
        queue[(pointer + torch.arange(N)) % K] = k
    return loss.item(), (pointer + N) % K


# wrong [moco-step-check]: right only where K is a multiple of N
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
        queue[pointer : pointer + N] = k[: K - pointer]
    return loss.item(), (pointer + N) % K


# wrong [moco-step-check]: the temperature on the positive only
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True) / temperature, q @ queue.T], dim=1)
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
        queue[(pointer + torch.arange(N)) % K] = k
    return loss.item(), (pointer + N) % K


# wrong [moco-step-check]: the momentum update the wrong way round
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q = F.normalize(f_q(view_q), dim=1)
    with torch.no_grad():
        k = F.normalize(f_k(view_k), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(1 - m).add_(theta_q, alpha=m)
        queue[(pointer + torch.arange(N)) % K] = k
    return loss.item(), (pointer + N) % K


# wrong [moco-step-hidden]: gradient through the keys
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q, k = F.normalize(f_q(view_q), dim=1), F.normalize(f_k(view_k), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)
        rows = (pointer + torch.arange(N)) % K
        queue[rows[-K:]] = k[-K:]
    return loss.item(), (pointer + N) % K


# wrong [moco-step-hidden]: a momentum of 0.7, whatever m is
def moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, m, temperature):
    N, K = len(view_q), len(queue)
    q, k = F.normalize(f_q(view_q), dim=1), F.normalize(f_k(view_k), dim=1).detach()
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for theta_k, theta_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            theta_k.mul_(0.7).add_(theta_q, alpha=0.3)
        rows = (pointer + torch.arange(N)) % K
        queue[rows[-K:]] = k[-K:]
    return loss.item(), (pointer + N) % K


# wrong [train-check]: f_k is f_q
def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = f_q
    queue, pointer = F.normalize(torch.randn(256, f_q.dim), dim=1), 0
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.12, momentum=0.9, weight_decay=5e-4)
    losses, per_epoch = [], len(images) // 64
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images)) if place == 0 else order
        index = order[64 * place : 64 * (place + 1)]
        view_q, view_k = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.06 * (1 + math.cos(math.pi * step / steps))
        loss, pointer = moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, 0.99, 0.1)
        losses.append(loss)
    return f_q, losses


# wrong [train-check]: the same crops in each epoch
def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = deepcopy(f_q).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(256, f_q.dim), dim=1), 0
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.12, momentum=0.9, weight_decay=5e-4)
    losses, per_epoch = [], len(images) // 64
    for step in range(steps):
        place = step % per_epoch
        order = torch.randperm(len(images)) if place == 0 else order
        index = order[64 * place : 64 * (place + 1)]
        view_q, view_k = two_views(images[index], index, "shapes", seed=seed)
        for group in optimizer.param_groups:
            group["lr"] = 0.06 * (1 + math.cos(math.pi * step / steps))
        loss, pointer = moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, 0.99, 0.1)
        losses.append(loss)
    return f_q, losses


# wrong [train-check]: the learning rate stays
def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = deepcopy(f_q).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(256, f_q.dim), dim=1), 0
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.12, momentum=0.9, weight_decay=5e-4)
    losses, per_epoch = [], len(images) // 64
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images)) if place == 0 else order
        index = order[64 * place : 64 * (place + 1)]
        view_q, view_k = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
        loss, pointer = moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, 0.99, 0.1)
        losses.append(loss)
    return f_q, losses


# wrong [train-check]: the first queue is not normalised
def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = deepcopy(f_q).requires_grad_(False)
    queue, pointer = torch.randn(256, f_q.dim), 0
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.12, momentum=0.9, weight_decay=5e-4)
    losses, per_epoch = [], len(images) // 64
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images)) if place == 0 else order
        index = order[64 * place : 64 * (place + 1)]
        view_q, view_k = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.06 * (1 + math.cos(math.pi * step / steps))
        loss, pointer = moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, 0.99, 0.1)
        losses.append(loss)
    return f_q, losses


# wrong [train-check]: the pointer is thrown away
def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = deepcopy(f_q).requires_grad_(False)
    queue = F.normalize(torch.randn(256, f_q.dim), dim=1)
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.12, momentum=0.9, weight_decay=5e-4)
    losses, per_epoch = [], len(images) // 64
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images)) if place == 0 else order
        index = order[64 * place : 64 * (place + 1)]
        view_q, view_k = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.06 * (1 + math.cos(math.pi * step / steps))
        loss, _ = moco_step(f_q, f_k, queue, 0, view_q, view_k, optimizer, 0.99, 0.1)
        losses.append(loss)
    return f_q, losses


# wrong [train-check]: the same order in each epoch
def train(images, steps, seed=0):
    torch.manual_seed(seed)
    f_q = build_encoder("tiny", images=plain_view(images[:2000]))
    f_k = deepcopy(f_q).requires_grad_(False)
    queue, pointer = F.normalize(torch.randn(256, f_q.dim), dim=1), 0
    optimizer = torch.optim.SGD(f_q.parameters(), lr=0.12, momentum=0.9, weight_decay=5e-4)
    losses, per_epoch = [], len(images) // 64
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        index = torch.arange(64 * place, 64 * (place + 1))
        view_q, view_k = two_views(images[index], index, "shapes", seed=seed, epoch=epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.06 * (1 + math.cos(math.pi * step / steps))
        loss, pointer = moco_step(f_q, f_k, queue, pointer, view_q, view_k, optimizer, 0.99, 0.1)
        losses.append(loss)
    return f_q, losses


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
