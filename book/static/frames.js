// A slider over pictures that were drawn in advance: no kernel, no network. The pictures lie in the page as JSON. Without
// scripts there is the first picture, and no slider.
document.querySelectorAll("figure.frames").forEach((figure) => {
  const frames = JSON.parse(figure.querySelector("script").textContent);
  const [image, slider, told] = ["img", "input", "output"].map((name) => figure.querySelector(name));
  const show = () => {
    image.src = "data:image/png;base64," + frames.pictures[slider.value];
    told.textContent = frames.values[slider.value];
    slider.setAttribute("aria-valuetext", told.textContent);
  };
  slider.addEventListener("input", show);
  show();
  figure.querySelectorAll("[hidden]").forEach((part) => { part.hidden = false; });
});
