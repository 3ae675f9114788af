# ruff: noqa
# Answers to assignment A6, in parts: `# wrong [test]: what` loses points on that test, `# right: how` has full points.

# wrong [interval-check]: 1.96 in place of Student's t
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


# wrong [interval-check]: the standard deviation of the runs
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    return mean, math.nan if n < 2 else math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))


# wrong [interval-check]: the standard error
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    return mean, math.nan if n < 2 else math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


# wrong [interval-check]: the whole width
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, 2 * stats.t.ppf(0.975, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


# wrong [interval-check]: divides by n in the deviation
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, stats.t.ppf(0.975, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / n / n)


# wrong [interval-check]: of one run the interval is 0
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, 0.0
    return mean, stats.t.ppf(0.975, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


# wrong [statistics-hidden]: Student's t for four runs, whatever their number
def interval(values):
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, stats.t.ppf(0.975, 3) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


# wrong [difference-check]: paired in the order they stand in
def difference(a, b):
    return interval([x - y for x, y in zip(a.values(), b.values(), strict=False)])


# wrong [difference-check]: the other way round
def difference(a, b):
    return interval([b[seed] - a[seed] for seed in a if seed in b])


# wrong [difference-check]: a seed that only one side has stops it
def difference(a, b):
    return interval([a[seed] - b[seed] for seed in a])


# wrong [difference-check]: not paired
def difference(a, b):
    (mean_a, half_a), (mean_b, half_b) = interval(list(a.values())), interval(list(b.values()))
    return mean_a - mean_b, math.hypot(half_a, half_b)


# wrong [verdict-check]: the sign alone
def verdict(mean, half):
    return "came out" if mean > 0 else "did not"


# wrong [verdict-check]: nan came out
def verdict(mean, half):
    if abs(mean) <= half:
        return "too small to tell"
    return "came out" if mean > 0 else "did not"


# wrong [verdict-check]: what is too small did not come out
def verdict(mean, half):
    return "came out" if mean - half > 0 else "did not"


# wrong [statistics-hidden]: twice as strict as the interval
def verdict(mean, half):
    if not abs(mean) > 2 * half:
        return "too small to tell"
    return "came out" if mean > 0 else "did not"


# wrong [rows-check]: two seeds
rows = [
    {"setting": "a", "seed": 0, "images_seen": 100, "knn_top1": 50.0},
    {"setting": "a", "seed": 1, "images_seen": 100, "knn_top1": 51.0},
    {"setting": "b", "seed": 0, "images_seen": 100, "knn_top1": 52.0},
    {"setting": "b", "seed": 1, "images_seen": 100, "knn_top1": 53.0},
]

# wrong [rows-check]: unequal budgets
rows = [
    {"setting": "a", "seed": 0, "images_seen": 100, "knn_top1": 50.0},
    {"setting": "a", "seed": 1, "images_seen": 100, "knn_top1": 51.0},
    {"setting": "a", "seed": 2, "images_seen": 100, "knn_top1": 51.0},
    {"setting": "b", "seed": 0, "images_seen": 200, "knn_top1": 52.0},
    {"setting": "b", "seed": 1, "images_seen": 200, "knn_top1": 53.0},
    {"setting": "b", "seed": 2, "images_seen": 200, "knn_top1": 53.0},
]

# wrong [rows-check]: one run three times
rows = [
    {"setting": "a", "seed": 0, "images_seen": 100, "knn_top1": 50.0},
    {"setting": "a", "seed": 0, "images_seen": 100, "knn_top1": 51.0},
    {"setting": "a", "seed": 0, "images_seen": 100, "knn_top1": 51.0},
    {"setting": "b", "seed": 0, "images_seen": 100, "knn_top1": 52.0},
    {"setting": "b", "seed": 0, "images_seen": 100, "knn_top1": 53.0},
    {"setting": "b", "seed": 0, "images_seen": 100, "knn_top1": 53.0},
]


# right: by scipy and by statistics
def interval(values):
    if len(values) == 1:
        return values[0], float("nan")
    mean = statistics.fmean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    return mean, float(high - low) / 2


def difference(a, b):
    both = sorted(set(a) & set(b))
    return interval([a[seed] - b[seed] for seed in both])


def verdict(mean, half):
    low, high = mean - half, mean + half
    return "came out" if low > 0 else "did not" if high < 0 else "too small to tell"


import statistics


# right: by torch
def interval(values):
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return x.item(), math.nan
    return x.mean().item(), stats.t.ppf(0.975, len(x) - 1) * x.std().item() / len(x) ** 0.5


def difference(a, b):
    return interval([value - b[seed] for seed, value in a.items() if seed in b.keys()])


def verdict(mean, half):
    if math.isnan(half) or mean - half <= 0 <= mean + half:
        return "too small to tell"
    return {True: "came out", False: "did not"}[mean > 0]
