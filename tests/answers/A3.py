# ruff: noqa
# Answers to assignment A3, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.

# wrong [momentum-update-check]: the wrong way round
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
            theta_k.mul_(1 - m).add_(theta_q, alpha=m)


# wrong [momentum-update-check]: only renames
def momentum_update(encoder, key_encoder, m):
    for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
        theta_k = m * theta_k + (1 - m) * theta_q


# wrong [momentum-update-check]: a copy
def momentum_update(encoder, key_encoder, m):
    key_encoder.load_state_dict(encoder.state_dict())


# wrong [momentum-update-check]: theta_k is not scaled
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
            theta_k.add_(theta_q, alpha=1 - m)


# wrong [momentum-update-check]: the encoder moves
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
            theta_k.copy_(theta_q.mul_(1 - m).add_(theta_k, alpha=m))


# wrong [momentum-update-hidden]: the biases are left out
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        for (name, theta_k), theta_q in zip(key_encoder.named_parameters(), encoder.parameters(), strict=True):
            if name.endswith("weight"):
                theta_k.mul_(m).add_(theta_q, alpha=1 - m)


# wrong [momentum-update-hidden]: BatchNorm's statistics are averaged too
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in zip(key_encoder.state_dict().values(), encoder.state_dict().values(), strict=True):
            if theta_k.is_floating_point():
                theta_k.mul_(m).add_(theta_q, alpha=1 - m)


# wrong [momentum-update-hidden]: with m = 0 the two share their tensors
def momentum_update(encoder, key_encoder, m):
    for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
        theta_k.data = theta_q.data if m == 0 else m * theta_k.data + (1 - m) * theta_q.data


# wrong [momentum-update-hidden]: the encoder's gradients are switched off for good
def momentum_update(encoder, key_encoder, m):
    encoder.requires_grad_(False)
    key_encoder.requires_grad_(False)
    for theta_k, theta_q in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
        theta_k.mul_(m).add_(theta_q, alpha=1 - m)


# wrong [momentum-update-hidden]: only the first two parameters
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        for theta_k, theta_q in list(zip(key_encoder.parameters(), encoder.parameters(), strict=True))[:2]:
            theta_k.mul_(m).add_(theta_q, alpha=1 - m)


# wrong [ema-check]: the wrong way round
def ema(signal, m):
    values = [signal[0]]
    for x in signal[1:]:
        values.append((1 - m) * values[-1] + m * x)
    return torch.stack(values)


# wrong [ema-check]: starts from 0
def ema(signal, m):
    y, values = torch.tensor(0.0), []
    for x in signal:
        y = m * y + (1 - m) * x
        values.append(y)
    return torch.stack(values)


# wrong [ema-check]: the signal's last two values
def ema(signal, m):
    return torch.cat([signal[:1], m * signal[:-1] + (1 - m) * signal[1:]])


# wrong [ema-hidden]: a window of fifty steps
def ema(signal, m):
    values = [signal[0]]
    for t in range(1, len(signal)):
        y = signal[max(0, t - 50)]
        for x in signal[max(0, t - 50) + 1 : t + 1]:
            y = m * y + (1 - m) * x
        values.append(y)
    return torch.stack(values)


# wrong [half-life-check]: the mean age
def half_life(m):
    return math.inf if m == 1 else 0.0 if m == 0 else 1 / (1 - m)


# wrong [half-life-check]: upside down
def half_life(m):
    return math.inf if m == 1 else 0.0 if m == 0 else math.log(m) / math.log(0.5)


# wrong [half-life-check]: m = 0 and m = 1 stop it
def half_life(m):
    return math.log(0.5) / math.log(m)


# wrong [half-life-hidden]: an approximation for m near 1
def half_life(m):
    return math.inf if m == 1 else 0.0 if m == 0 else math.log(2) / (1 - m) - 0.34657


# wrong [similarity-by-age-check]: dot products
def similarity_by_age(stored, again, ages):
    dots = (stored * again).sum(dim=1)
    return {age: dots[ages == age].mean().item() for age in ages.unique().tolist()}


# wrong [similarity-by-age-check]: every key with every key
def similarity_by_age(stored, again, ages):
    cosines = (F.normalize(stored, dim=1) @ F.normalize(again, dim=1).T).mean(dim=1)
    return {age: cosines[ages == age].mean().item() for age in ages.unique().tolist()}


# wrong [similarity-by-age-check]: tensors as keys of the dict
def similarity_by_age(stored, again, ages):
    cosines = F.cosine_similarity(stored, again)
    return {age: cosines[ages == age].mean().item() for age in ages}


# wrong [similarity-by-age-check]: along the wrong axis
def similarity_by_age(stored, again, ages):
    cosines = (F.normalize(stored, dim=0) * F.normalize(again, dim=0)).sum(dim=1)
    return {age: cosines[ages == age].mean().item() for age in ages.unique().tolist()}


# wrong [similarity-by-age-hidden]: ages above 10 are left out
def similarity_by_age(stored, again, ages):
    cosines = F.cosine_similarity(stored, again)
    return {age: cosines[ages == age].mean().item() for age in range(1, 11) if (ages == age).any()}


# right: lerp, a running dict, torch's cosine
def momentum_update(encoder, key_encoder, m):
    with torch.no_grad():
        torch._foreach_lerp_(list(key_encoder.parameters()), list(encoder.parameters()), 1 - m)


def ema(signal, m):
    values = torch.empty_like(signal)
    for t, x in enumerate(signal):
        values[t] = x if t == 0 else m * values[t - 1] + (1 - m) * x
    return values


def half_life(m):
    try:
        return -math.log(2) / math.log(m)
    except (ValueError, ZeroDivisionError):
        return 0.0 if m == 0 else float("inf")


def similarity_by_age(stored, again, ages):
    sums, counts = {}, {}
    for s, a, age in zip(F.normalize(stored, dim=1), F.normalize(again, dim=1), ages.tolist(), strict=True):
        sums[age] = sums.get(age, 0.0) + float(s @ a)
        counts[age] = counts.get(age, 0) + 1
    return {age: total / counts[age] for age, total in sums.items()}


# right: names, .data, a loop of floats
def momentum_update(encoder, key_encoder, m):
    theirs = dict(encoder.named_parameters())
    for name, parameter in key_encoder.named_parameters():
        parameter.data.copy_(parameter.data * m + theirs[name].data * (1.0 - m))


def ema(signal, m):
    weights = [float(x) for x in signal]
    for t in range(1, len(weights)):
        weights[t] = m * weights[t - 1] + (1 - m) * weights[t]
    return torch.tensor(weights)


def half_life(m):
    if m == 0:
        return 0
    if m == 1:
        return math.inf
    return math.log2(0.5) / math.log2(m)


def similarity_by_age(stored, again, ages):
    cosines = (stored * again).sum(1) / (stored.norm(dim=1) * again.norm(dim=1))
    return {int(age): float(cosines[ages == age].mean()) for age in sorted(set(ages.tolist()))}
