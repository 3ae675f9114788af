# ruff: noqa
# Answers to assignment A5, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.

# wrong [diagnosis-check]: not finished
diagnosis = {1: "D", 2: "H", 3: "C", 4: "B", 5: "?", 6: "?", 7: "?", 8: "?"}

# wrong [diagnosis-check]: the same bug twice
diagnosis = {1: "D", 2: "H", 3: "C", 4: "B", 5: "A", 6: "G", 7: "F", 8: "F"}

# wrong [diagnosis-hidden]: two exchanged
diagnosis = {1: "D", 2: "H", 3: "F", 4: "B", 5: "A", 6: "G", 7: "C", 8: "I"}

# wrong [diagnosis-hidden]: taken in by a bug that nobody has
diagnosis = {1: "D", 2: "H", 3: "C", 4: "E", 5: "A", 6: "G", 7: "F", 8: "I"}


# wrong [first-queue-check]: the columns are normalised
def first_queue(K, dim):
    return F.normalize(torch.randn(K, dim), dim=0)


# wrong [first-queue-check]: all in one quarter of space
def first_queue(K, dim):
    return F.normalize(torch.rand(K, dim), dim=1)


# wrong [first-queue-check]: length 1 on average
def first_queue(K, dim):
    return torch.randn(K, dim) / dim**0.5


# wrong [views-of-check]: twice the other one
def views_of(images, index, epoch):
    view_q, view_k = two_views(images, index, "shapes", epoch=epoch)
    return view_k, view_k


# wrong [views-of-check]: other views than those of this epoch
def views_of(images, index, epoch):
    return two_views(images, index, "shapes", epoch=0)


# wrong [momentum-update-check]: a copy
def momentum_update(f_q, f_k, m):
    with torch.no_grad():
        for theta_q, theta_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
            theta_k.copy_(theta_q)


# wrong [cures-hidden]: m is the check's
def momentum_update(f_q, f_k, m):
    with torch.no_grad():
        for theta_q, theta_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
            theta_k.copy_(0.9 * theta_k + 0.1 * theta_q)


# wrong [logits-of-check]: the positive only
def logits_of(q, k, negatives, temperature):
    return torch.cat([(q * k).sum(dim=1, keepdim=True) / temperature, q @ negatives.T], dim=1)


# wrong [cures-hidden]: five times the similarities, whatever the temperature
def logits_of(q, k, negatives, temperature):
    return torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) * 5


# wrong [keys-of-check]: shuffled once more
def keys_of(f_k, view, order):
    with torch.no_grad():
        return F.normalize(f_k(view[order]), dim=1)[order]


# wrong [embed-check]: over the images
def embed(encoder, view):
    return F.normalize(encoder.head(encoder.backbone(view)), dim=0)


# wrong [embed-check]: without gradient
def embed(encoder, view):
    with torch.no_grad():
        return F.normalize(encoder.head(encoder.backbone(view)), dim=1)


# wrong [embed-check]: the features are normalised, not what the loss compares
def embed(encoder, view):
    return encoder.head(F.normalize(encoder.backbone(view), dim=1))


# wrong [enqueue-check]: the pointer runs out of the queue
def enqueue(queue, pointer, keys):
    K, N = len(queue), len(keys)
    rows = (pointer + torch.arange(N)) % K
    queue[rows[-K:]] = keys[-K:]
    return pointer + N


# wrong [look-up-check]: the keys never get into the queue
def look_up(q, k, queue, pointer, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    return logits, (pointer + len(k)) % len(queue)


# wrong [look-up-check]: a copy of the queue gets them
def look_up(q, k, queue, pointer, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    queue = queue.clone()
    queue[(pointer + torch.arange(len(k))) % len(queue)] = k
    return logits, (pointer + len(k)) % len(queue)


# right: in other words
def first_queue(K, dim):
    points = torch.randn(K, dim)
    return points / points.norm(dim=1, keepdim=True)


def views_of(images, index, epoch):
    return two_views(images, index, "shapes", epoch=epoch)


def momentum_update(f_q, f_k, m):
    for theta_q, theta_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
        theta_k.data.lerp_(theta_q.data, 1 - m)


def logits_of(q, k, negatives, temperature):
    return torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], q @ negatives.T], dim=1).div(temperature)


def keys_of(f_k, view, order):
    k = F.normalize(f_k(view[order]).detach(), dim=1)
    back = torch.empty_like(k)
    back[order] = k
    return back


def embed(encoder, view):
    out = encoder.head(encoder.backbone(view))
    return out / out.norm(dim=1, keepdim=True)


def enqueue(queue, pointer, keys):
    for key in keys:
        queue[pointer] = key
        pointer = (pointer + 1) % len(queue)
    return pointer


def look_up(q, k, queue, pointer, temperature):
    before = queue.clone()
    pointer = enqueue(queue, pointer, k)
    return torch.cat([(q * k).sum(dim=1, keepdim=True), q @ before.T], dim=1) / temperature, pointer


# right: the diagnosis as given, in another order
diagnosis = {8: "I", 7: "F", 6: "G", 5: "A", 4: "B", 3: "C", 2: "H", 1: "D"}
