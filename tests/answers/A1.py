# ruff: noqa
# Answers to assignment A1, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.

# wrong [softmax-check]: over the columns
def softmax(logits):
    e = (logits - logits.max()).exp()
    return e / e.sum(dim=0, keepdim=True)


# wrong [softmax-check]: not stable
def softmax(logits):
    e = logits.exp()
    return e / e.sum(dim=1, keepdim=True)


# wrong [softmax-hidden]: the largest logit of all rows is subtracted, so that other rows become 0 / 0
def softmax(logits):
    e = (logits - logits.max()).exp()
    return e / e.sum(dim=1, keepdim=True)


# wrong [info-nce-check]: the temperature multiplies
def info_nce(q, k, negatives, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) * temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [info-nce-check]: the temperature on the positive only
def info_nce(q, k, negatives, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True) / temperature, q @ negatives.T], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [info-nce-check]: the own key is missing below the fraction
def info_nce(q, k, negatives, temperature):
    positive, others = (q * k).sum(dim=1) / temperature, q @ negatives.T / temperature
    return (torch.logsumexp(others, dim=1) - positive).mean()


# wrong [info-nce-check]: labels are the rows' numbers
def info_nce(q, k, negatives, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


# wrong [info-nce-check]: every query with every key as a positive
def info_nce(q, k, negatives, temperature):
    logits = torch.cat([q @ k.T, q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [info-nce-check]: the sum over the queries
def info_nce(q, k, negatives, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="sum")


# wrong [info-nce-check]: exp() by hand, nan at a low temperature
def info_nce(q, k, negatives, temperature):
    e = (torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature).exp()
    return -(e[:, 0] / e.sum(dim=1)).log().mean()


# wrong [info-nce-hidden]: the queries are divided in place
def info_nce(q, k, negatives, temperature):
    with torch.no_grad():
        q /= temperature
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [info-nce-hidden]: nothing flows back
def info_nce(q, k, negatives, temperature):
    with torch.no_grad():
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [info-nce-hidden]: logits cut off at 30, which is finite and wrong
def info_nce(q, k, negatives, temperature):
    logits = (torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature).clamp(-30, 30)
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [info-nce-hidden]: only right for six queries, as in the check
def info_nce(q, k, negatives, temperature):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="sum") / 6


# wrong [nce-check]: the mean over the noise keys
def nce(q, k, negatives, temperature, n, log_z):
    shift = log_z + math.log(len(negatives) / n)
    own, noise = (q * k).sum(dim=1) / temperature - shift, q @ negatives.T / temperature - shift
    return (F.softplus(-own) + F.softplus(noise).mean(dim=1)).mean()


# wrong [nce-check]: n / K in place of K / n
def nce(q, k, negatives, temperature, n, log_z):
    shift = log_z + math.log(n / len(negatives))
    own, noise = (q * k).sum(dim=1) / temperature - shift, q @ negatives.T / temperature - shift
    return (F.softplus(-own) + F.softplus(noise).sum(dim=1)).mean()


# wrong [nce-check]: Z is forgotten
def nce(q, k, negatives, temperature, n, log_z):
    shift = math.log(len(negatives) / n)
    own, noise = (q * k).sum(dim=1) / temperature - shift, q @ negatives.T / temperature - shift
    return (F.softplus(-own) + F.softplus(noise).sum(dim=1)).mean()


# wrong [nce-check]: it is InfoNCE again
def nce(q, k, negatives, temperature, n, log_z):
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


# wrong [nce-check]: log(1 - P) by hand, infinite at a low temperature
def nce(q, k, negatives, temperature, n, log_z):
    K = len(negatives)
    own, noise = ((torch.exp(s / temperature - log_z)) for s in ((q * k).sum(dim=1), q @ negatives.T))
    own, noise = own / (own + K / n), noise / (noise + K / n)
    return (-own.log() - (1 - noise).log().sum(dim=1)).mean()


# wrong [nce-hidden]: K is the nine of the check
def nce(q, k, negatives, temperature, n, log_z):
    shift = log_z + math.log(9 / n)
    own, noise = (q * k).sum(dim=1) / temperature - shift, q @ negatives.T / temperature - shift
    return (F.softplus(-own) + F.softplus(noise).sum(dim=1)).mean()


# wrong [gradient-check]: 1 / tau is missing
def gradient(similarity, temperature):
    p = (similarity / temperature).softmax(dim=1)
    p[:, 0] -= 1
    return p / len(similarity)


# wrong [gradient-check]: 1 / N is missing
def gradient(similarity, temperature):
    p = (similarity / temperature).softmax(dim=1)
    p[:, 0] -= 1
    return p / temperature


# wrong [gradient-check]: the own key is pushed away too
def gradient(similarity, temperature):
    return (similarity / temperature).softmax(dim=1) / temperature / len(similarity)


# wrong [gradient-check]: the sign
def gradient(similarity, temperature):
    p = -(similarity / temperature).softmax(dim=1)
    p[:, 0] += 1
    return p / temperature / len(similarity)


# wrong [gradient-hidden]: divided by the columns, not the rows, of a matrix that is not square
def gradient(similarity, temperature):
    p = (similarity / temperature).softmax(dim=1)
    p[:, 0] -= 1
    return p / temperature / (len(similarity) if len(similarity) == 5 else similarity.shape[1])


# wrong [gradient-hidden]: the similarities are changed in place
def gradient(similarity, temperature):
    p = similarity.div_(temperature).softmax(dim=1)
    p[:, 0] -= 1
    return p / temperature / len(similarity)


# wrong [effective-negatives-check]: the own key counts as a negative
def effective_negatives(similarity, temperature):
    log_p = (similarity / temperature).log_softmax(dim=1)
    return (-(log_p.exp() * log_p).sum(dim=1)).exp()


# wrong [effective-negatives-check]: the entropy itself
def effective_negatives(similarity, temperature):
    log_p = (similarity[:, 1:] / temperature).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


# wrong [effective-negatives-hidden]: 0 log 0 is nan
def effective_negatives(similarity, temperature):
    p = (similarity[:, 1:] / temperature).softmax(dim=1)
    return (-(p * p.log()).sum(dim=1)).exp()


# right: everything by logsumexp and one-hot
def softmax(logits):
    return (logits - torch.logsumexp(logits, dim=1, keepdim=True)).exp()


def info_nce(q, k, negatives, temperature):
    positive = torch.einsum("nc,nc->n", q, k) / temperature
    others = torch.einsum("nc,kc->nk", q, negatives) / temperature
    everything = torch.logaddexp(positive, torch.logsumexp(others, dim=1))
    return (everything - positive).mean()


def nce(q, k, negatives, temperature, n, log_z):
    keys_own, keys_noise = (q * k).sum(1), q.matmul(negatives.t())
    log_odds = lambda s: s / temperature - log_z - math.log(len(negatives)) + math.log(n)
    bce = F.binary_cross_entropy_with_logits
    own = bce(log_odds(keys_own), torch.ones(len(q)), reduction="none")
    noise = bce(log_odds(keys_noise), torch.zeros(len(q), len(negatives)), reduction="none")
    return (own + noise.sum(1)).mean()


def gradient(similarity, temperature):
    N, M = similarity.shape
    own = F.one_hot(torch.zeros(N, dtype=torch.long), M)
    return (torch.softmax(similarity / temperature, 1) - own) / (N * temperature)


def effective_negatives(similarity, temperature):
    return torch.distributions.Categorical(logits=similarity[:, 1:] / temperature).entropy().exp()


# right: loops over the queries
def softmax(logits):
    return torch.stack([torch.exp(row - row.max()) / torch.exp(row - row.max()).sum() for row in logits])


def info_nce(q, k, negatives, temperature):
    losses = []
    for query, key in zip(q, k, strict=True):
        logits = torch.cat([(query @ key).view(1), negatives @ query]) / temperature
        losses.append(-logits.log_softmax(dim=0)[0])
    return sum(losses) / len(losses)


def nce(q, k, negatives, temperature, n, log_z):
    total = 0
    for query, key in zip(q, k, strict=True):
        a = torch.cat([(query @ key).view(1), negatives @ query]) / temperature - log_z - math.log(len(negatives) / n)
        total = total - F.logsigmoid(a[0]) - F.logsigmoid(-a[1:]).sum()
    return total / len(q)


def gradient(similarity, temperature):
    rows = []
    for row in similarity:
        p = torch.softmax(row / temperature, dim=0)
        rows.append(torch.cat([p[:1] - 1, p[1:]]))
    return torch.stack(rows) / temperature / len(rows)


def effective_negatives(similarity, temperature):
    p = torch.softmax(similarity[:, 1:] / temperature, dim=-1)
    return torch.exp(torch.special.entr(p).sum(-1))
