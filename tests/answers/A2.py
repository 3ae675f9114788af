# ruff: noqa
# Answers to assignment A2, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.
# `# -` and `# +` lines are the solution with these lines out and in.

# wrong [enqueue-check]: always at place 0
def enqueue(queue, pointer, keys):
    K = len(queue)
    queue[: len(keys[-K:])] = keys[-K:]
    return (pointer + len(keys)) % K


# wrong [enqueue-check]: new keys in front, the rest moved along
def enqueue(queue, pointer, keys):
    queue.copy_(torch.cat([keys, queue.clone()])[: len(queue)])
    return 0


# wrong [enqueue-check]: right only where K is a multiple of the batch
def enqueue(queue, pointer, keys):
    queue[pointer : pointer + len(keys)] = keys
    return (pointer + len(keys)) % len(queue)


# wrong [enqueue-check]: keys that do not fit at the end are dropped (as in a published memory bank)
def enqueue(queue, pointer, keys):
    room = min(len(keys), len(queue) - pointer)
    queue[pointer : pointer + room] = keys[:room]
    return (pointer + len(keys)) % len(queue)


# wrong [enqueue-check]: the pointer runs out of the queue
def enqueue(queue, pointer, keys):
    K = len(queue)
    rows = (pointer + torch.arange(len(keys))) % K
    queue[rows[-K:]] = keys[-K:]
    return pointer + len(keys)


# wrong [enqueue-check]: a new queue, the old one unchanged
def enqueue(queue, pointer, keys):
    rows = (pointer + torch.arange(len(keys))) % len(queue)
    queue = queue.clone()
    queue[rows] = keys
    return (pointer + len(keys)) % len(queue)


# wrong [enqueue-check]: of too many keys the first are kept
def enqueue(queue, pointer, keys):
    K = len(queue)
    rows = (pointer + torch.arange(len(keys))) % K
    queue[rows[:K]] = keys[:K]
    return (pointer + len(keys)) % K


# wrong [enqueue-hidden]: an empty batch writes everything
def enqueue(queue, pointer, keys):
    K, N = len(queue), len(keys)
    if N == 0:
        queue.zero_()
    rows = (pointer + torch.arange(N)) % K
    queue[rows[-K:]] = keys[-K:]
    return (pointer + N) % K


# wrong [enqueue-hidden]: wraps around once, but not twice
def enqueue(queue, pointer, keys):
    K, N = len(queue), len(keys)
    first = min(N, K - pointer)
    queue[pointer : pointer + first] = keys[:first]
    rest = keys[first:][:K]
    queue[: len(rest)] = rest
    return (pointer + N) % K


# wrong [enqueue-hidden]: the keys are normalised in place on the way
def enqueue(queue, pointer, keys):
    K, N = len(queue), len(keys)
    rows = (pointer + torch.arange(N)) % K
    queue[rows[-K:]] = keys[-K:]
    keys.mul_(0.5)
    return (pointer + N) % K


# wrong [oldest-check]: rounded down
def oldest(K, batch):
    return K // batch


# wrong [oldest-check]: counts keys
def oldest(K, batch):
    return K


# wrong [oldest-check]: the newest key has age 0
def oldest(K, batch):
    return (K + batch - 1) // batch - 1


# wrong [oldest-hidden]: rounds to the nearest
def oldest(K, batch):
    return max(1, round(K / batch + 0.26))


# wrong [ages-check]: one too small
def ages(K, batch, steps):
    born = torch.full((K,), -1)
    for step in range(steps):
        born[torch.arange(step * batch, (step + 1) * batch) % K] = step
    return torch.where(born < 0, -1, steps - 1 - born)


# wrong [ages-check]: unwritten rows are 0
def ages(K, batch, steps):
    born = torch.full((K,), steps)
    for step in range(steps):
        born[torch.arange(step * batch, (step + 1) * batch) % K] = step
    return steps - born


# wrong [ages-check]: the ring is written once
def ages(K, batch, steps):
    born = torch.full((K,), -1)
    for step in range(steps):
        born[step * batch : (step + 1) * batch] = step
    return torch.where(born < 0, -1, steps - born)


# wrong [ages-hidden]: a formula that forgets what does not fit, for batches larger than the queue
def ages(K, batch, steps):
    if batch > 2 * K:
        return torch.full((K,), steps if steps else -1)
    born = torch.full((K,), -1)
    for step in range(steps):
        born[torch.arange(step * batch, (step + 1) * batch) % K] = step
    return torch.where(born < 0, -1, steps - born)


# wrong [queue-check]: the first keys are not normalised
# - self.keys = F.normalize(torch.randn(K, dim), dim=1)
# + self.keys = torch.randn(K, dim)

# wrong [queue-check]: the pointer is lost on resume
# - return {"keys": self.keys.clone(), "pointer": torch.tensor(self.pointer)}
# + return {"keys": self.keys.clone()}
# - self.pointer = int(state["pointer"])

# wrong [queue-check]: the queue is lost on resume
# - return {"keys": self.keys.clone(), "pointer": torch.tensor(self.pointer)}
# + return {"pointer": torch.tensor(self.pointer)}
# - self.keys = state["keys"].clone()

# wrong [queue-hidden]: the state is no copy
# - return {"keys": self.keys.clone(), "pointer": torch.tensor(self.pointer)}
# + return {"keys": self.keys, "pointer": torch.tensor(self.pointer)}

# wrong [queue-hidden]: loading makes no copy
# - self.keys = state["keys"].clone()
# + self.keys = state["keys"]

# wrong [queue-hidden]: each queue starts with the same keys
# - self.keys = F.normalize(torch.randn(K, dim), dim=1)
# + torch.manual_seed(0)
# + self.keys = F.normalize(torch.randn(K, dim), dim=1)


# right: key by key
def enqueue(queue, pointer, keys):
    for key in keys:
        queue[pointer] = key
        pointer = (pointer + 1) % len(queue)
    return pointer


def oldest(K, batch):
    return -(-K // batch)


def ages(K, batch, steps):
    born = [-1] * K
    for key in range(batch * steps):
        born[key % K] = key // batch
    return torch.tensor([steps - step if step >= 0 else -1 for step in born])


class Queue:
    def __init__(self, K, dim):
        points = torch.randn(K, dim)
        self.keys = points / points.norm(dim=1, keepdim=True)
        self.next = 0

    def enqueue(self, keys):
        for key in keys:
            self.keys[self.next] = key
            self.next = (self.next + 1) % len(self.keys)

    def state(self):
        return dict(keys=self.keys.detach().clone(), next=torch.tensor([self.next]))

    def load(self, state):
        self.keys.copy_(state["keys"])
        self.next = state["next"].item()


# right: roll, write in front, roll back; a module with buffers
def enqueue(queue, pointer, keys):
    K, N = queue.shape[0], keys.shape[0]
    kept, start = keys[max(0, N - K) :], pointer + max(0, N - K)
    turned = queue.roll(-(start % K), 0)
    turned[: len(kept)] = kept
    queue[:] = turned.roll(start % K, 0)
    return (pointer + N) % K


def oldest(K, batch):
    steps = 0
    while steps * batch < K:
        steps += 1
    return steps


def ages(K, batch, steps):
    total, place = steps * batch, torch.arange(K)
    last = total - 1 - (total - 1 - place) % K
    return torch.where((last >= 0) & (last < total) & (total > 0), steps - last // batch, -1)


class Queue(torch.nn.Module):
    def __init__(self, K, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(K, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def enqueue(self, keys):
        self.pointer.fill_(enqueue(self.keys, int(self.pointer), keys))

    def state(self):
        return {name: value.clone() for name, value in self.state_dict().items()}

    def load(self, state):
        self.load_state_dict(state)
