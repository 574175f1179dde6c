// The nearest point under the pointer (or under the arrow keys) shows its image.
const box = document.querySelector(".mapbox");
if (box) {
  const svg = box.querySelector("svg"), tip = box.querySelector(".tip"), thumb = box.querySelector(".thumb");
  const about = JSON.parse(document.getElementById("map-data").textContent);
  const marks = [...svg.children];
  const places = marks.map((mark) => {
    const { e, f } = mark.transform.baseVal[0].matrix;
    return [e, f];
  });
  let current = -1;

  function show(number) {
    if (number === current) return;
    if (current >= 0) marks[current].classList.remove("on");
    current = number;
    tip.hidden = number < 0;
    svg.classList.toggle("pointing", number >= 0);
    if (number < 0) return;
    marks[number].classList.add("on");
    marks.forEach((mark, other) => mark.classList.toggle("same", about.labels[other] === about.labels[number]));
    tip.querySelector("p").textContent = about.captions[number];
    if (thumb) {
      const side = 118;
      thumb.style.backgroundSize = `${about.columns * side}px ${about.rows * side}px`;
      const left = (number % about.columns) * side, top = Math.floor(number / about.columns) * side;
      thumb.style.backgroundPosition = `${-left}px ${-top}px`;
    }
    // Beside the point, on the side that has room.
    const scale = svg.clientWidth / svg.viewBox.baseVal.width;
    const x = places[number][0] * scale, y = places[number][1] * scale;
    const left = x + 14 + tip.offsetWidth > box.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, Math.min(left, box.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, Math.min(y - 40, box.clientHeight - tip.offsetHeight))}px`;
  }

  function nearest(x, y, allowed = () => true) {
    let best = -1, least = Infinity;
    places.forEach(([px, py], number) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least && allowed(px - x, py - y)) [best, least] = [number, distance];
    });
    return [best, Math.sqrt(least)];
  }

  function point(event) {
    const frame = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / frame.width;
    const [number, distance] = nearest((event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale);
    show(distance < 24 * Math.max(1, scale) ? number : -1);
  }
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(-1));
  box.addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") show(-1);
    if (!(event.key in ways) || !marks.length) return;
    event.preventDefault();
    if (current < 0) return show(0);
    const [dx, dy] = ways[event.key], [x, y] = places[current];
    const ahead = (ax, ay) => ax * dx + ay * dy > Math.abs(ax * dy) + Math.abs(ay * dx);
    const [next] = nearest(x, y, ahead);
    if (next >= 0) show(next);
  });
}
