"Draw the pictures of docs/use.md: `python docs/pictures.py`, about a minute of one core."
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from matplotlib import pyplot as plt

import localmamba  # noqa: F401  registers the models
from localmamba.data import digit_scenes, load_data

HERE = Path(__file__).parent


def orders():
    "The three orders of a volume of 4 × 6 × 8 voxels."
    grid = np.arange(4 * 6 * 8).reshape(4, 6, 8)
    blocks = grid.reshape(2, 2, 3, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5)
    drawn = {'slice by slice': grid, 'column by column': grid.transpose(1, 2, 0), 'in blocks of 2 × 2 × 2': blocks}
    figure = plt.figure(figsize=(8, 3))
    for i, (name, order) in enumerate(drawn.items()):
        ax = figure.add_subplot(1, 3, i + 1, projection='3d', box_aspect=(8, 6, 4))
        z, y, x = np.unravel_index(order.ravel(), grid.shape)
        ax.plot(x, y, z, color='.6', lw=.8)
        ax.scatter(x, y, z, c=np.arange(len(x)), cmap='viridis', s=12, depthshade=False)
        ax.set(title=name, xticks=[], yticks=[], zticks=[])
        ax.title.set_fontsize(10)
    figure.subplots_adjust(0, 0, 1, .92, 0, 0)
    figure.savefig(HERE/'orders3d.png', dpi=100)


def bundled():
    "The model whose weights come with the package and photographs that it has not seen; None without CIFAR-10."
    try:
        model = timm.create_model('local_vmamba_nano.cifar10', pretrained=True).eval()
        valid = load_data('cifar10', n_train=64, n_valid=64)[1]
    except (RuntimeError, FileNotFoundError) as error: return print(f'digits instead: {error}')
    mean, std = (torch.tensor(model.pretrained_cfg[n]).view(3, 1, 1) for n in ('mean', 'std'))
    return model, valid, (torch.from_numpy(valid.images).permute(0, 3, 1, 2) / 255 - mean) / std


def trained(steps=200, batch=24):
    "A small model that reads digits on photographs, and scenes it has not seen."
    torch.manual_seed(0)
    train, valid = digit_scenes(n_train=1000, n_valid=64)
    tensor = lambda images: torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    model = timm.create_model('local_vmamba_nano', dims=(24, 48), depths=(1, 1), d_state=4)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps + 1)
    for step in range(steps):
        chosen = np.random.default_rng([0, step]).integers(len(train), size=batch)
        logits = model(tensor(train.images[chosen]))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(train.labels[chosen])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    return model.eval(), valid, tensor(valid.images)


def gradcam(panels=3):
    "Pictures whose class is surest, and where the score of that class comes from."
    (model, valid, images), kept = bundled() or trained(), {}
    model.norm.register_forward_hook(lambda module, given, features: kept.update(features=features))
    model.norm.register_full_backward_hook(lambda module, given, wanted: kept.update(wanted=wanted[0]))
    logits, labels = model(images), torch.from_numpy(valid.labels)
    logits.gather(1, labels[:, None]).sum().backward()
    cam = (kept['features'] * kept['wanted'].mean((1, 2), keepdim=True)).sum(-1).relu().detach()
    sure = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    print(f'right: {(logits.argmax(1) == labels).float().mean():.0%} of {len(labels)} scenes')
    figure, axes = plt.subplots(1, 2 * panels, figsize=(8, 1.6), layout='constrained')
    for (left, right), i in zip(axes.reshape(-1, 2), sure.topk(panels).indices):
        left.imshow(valid.images[i]), left.set_title(f'{valid.classes[labels[i]]}: {sure[i]:.0%}', fontsize=9)
        right.imshow(valid.images[i].mean(-1), cmap='gray')
        right.imshow(cam[i], cmap='inferno', alpha=.6, extent=(-.5, 31.5, 31.5, -.5), interpolation='bicubic')
        left.axis('off'), right.axis('off')
    figure.savefig(HERE/'gradcam.png', dpi=100)


if __name__ == '__main__':
    matplotlib.use('Agg')
    torch.set_num_threads(1)
    orders()
    gradcam()
