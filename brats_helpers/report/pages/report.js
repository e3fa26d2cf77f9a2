"use strict";

// Tables: a button in each heading sorts by its column. Cells without a number stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// Printing: open all closed sections, and close them afterwards.
const folded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    folded.push(details);
  }
});
addEventListener("afterprint", () => {
  for (const details of folded.splice(0)) details.open = false;
});

// The viewer: a patient's slices come as one tiled image per modality, and one for both segmentations.
// They are unpacked into volumes once, and cut in three planes from there.
const viewer = document.getElementById("viewer");
if (viewer) {
  const { patients, regions } = JSON.parse(document.getElementById("viewer-data").textContent);
  const control = (name) => viewer.querySelector(`[name=${name}]`);
  const SCALE = 3; // canvas pixels per voxel
  // Each plane: the axes that run right and down, the one that the slider moves along, and if down is towards the feet.
  const planes = [
    { name: "axial", right: 0, down: 1, along: 2, flip: false },
    { name: "coronal", right: 0, down: 2, along: 1, flip: true },
    { name: "sagittal", right: 1, down: 2, along: 0, flip: true },
  ];
  for (const plane of planes) {
    const place = viewer.querySelector(`[data-plane=${plane.name}]`);
    Object.assign(plane, {
      canvas: place.querySelector("canvas"),
      slider: place.querySelector("input"),
      output: place.querySelector("output"),
    });
  }
  let patient, image, labels, at; // what is drawn
  let listed, asked; // whose images can be chosen; the latest choice

  function sheet(width, height) {
    return Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  }

  async function unpack(tiles, { shape: [nx, ny, nz], columns }) {
    const picture = new Image();
    picture.src = tiles;
    await picture.decode();
    const context = sheet(picture.width, picture.height);
    context.drawImage(picture, 0, 0);
    const pixels = context.getImageData(0, 0, picture.width, picture.height).data;
    const volume = new Uint8Array(nx * ny * nz);
    for (let z = 0, to = 0; z < nz; z++) {
      const left = (z % columns) * nx, top = Math.floor(z / columns) * ny;
      for (let y = 0; y < ny; y++) {
        let from = 4 * ((top + y) * picture.width + left);
        for (let x = 0; x < nx; x++, from += 4) volume[to++] = pixels[from];
      }
    }
    return volume;
  }

  function draw(plane) {
    const { shape, spacing } = patient;
    const [width, height] = [shape[plane.right], shape[plane.down]];
    const steps = [1, shape[0], shape[0] * shape[1]];
    const start = at[plane.along] * steps[plane.along];
    const row = (y) => (plane.flip ? height - 1 - y : y);
    const offset = (x, y) => start + x * steps[plane.right] + row(y) * steps[plane.down];
    const isIn = (kind, region, x, y) =>
      x >= 0 && y >= 0 && x < width && y < height && region.classes.includes((labels[offset(x, y)] >> kind) & 3);

    // Grey, and the prediction as a fill: the innermost region's colour.
    const slice = new ImageData(width, height);
    const filled = control("prediction").checked;
    for (let y = 0, to = 0; y < height; y++) {
      for (let x = 0; x < width; x++, to += 4) {
        const grey = image[offset(x, y)];
        const region = filled ? regions.findLast((_, k) => isIn(6, regions[k], x, y)) : undefined;
        for (let k = 0; k < 3; k++) slice.data[to + k] = region ? 0.6 * grey + 0.4 * region.rgb[k] : grey;
        slice.data[to + 3] = 255;
      }
    }
    const small = sheet(width, height);
    small.putImageData(slice, 0, 0);
    const { canvas } = plane;
    const [across, down] = [SCALE * spacing[plane.right], SCALE * spacing[plane.down]];
    canvas.width = Math.round(width * across);
    canvas.height = Math.round(height * down);
    const context = canvas.getContext("2d");
    context.drawImage(small.canvas, 0, 0, canvas.width, canvas.height);

    // The reference as an outline along the edges of its voxels; that of TC shows on both sides of ET's.
    for (const region of control("reference").checked ? regions : []) {
      context.strokeStyle = region.colour;
      context.lineWidth = region.name === "TC" ? 6 : 2.5;
      context.beginPath();
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          if (!isIn(4, region, x, y)) continue;
          for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
            if (isIn(4, region, x + dx, y + dy)) continue;
            const [left, top] = [x + (dx > 0), y + (dy > 0)];
            context.moveTo(left * across, top * down);
            context.lineTo((left + (dx === 0)) * across, (top + (dy === 0)) * down);
          }
        }
      }
      context.stroke();
    }

    // Where the other two planes cut this one: ticks at its edges.
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.beginPath();
    const [x, y] = [(at[plane.right] + 0.5) * across, (row(at[plane.down]) + 0.5) * down];
    for (const [ends, other] of [[[0, canvas.height], x], [[0, canvas.width], y]]) {
      for (const end of ends) {
        const inner = end ? end - 14 : 14;
        other === x ? context.moveTo(x, end) : context.moveTo(end, y);
        other === x ? context.lineTo(x, inner) : context.lineTo(inner, y);
      }
    }
    context.stroke();

    const number = at[plane.along] + patient.origin[plane.along];
    plane.slider.max = shape[plane.along] - 1;
    plane.slider.value = at[plane.along];
    plane.slider.setAttribute("aria-valuetext", `slice ${number}`);
    plane.output.value = number;
    const shown = control("modality").selectedOptions[0].textContent;
    canvas.setAttribute("aria-label", `${patient.id}, ${shown}, ${plane.name} slice ${number}`);
  }

  function move(axis, to) {
    at[axis] = Math.max(0, Math.min(patient.shape[axis] - 1, to));
  }

  async function show() {
    const mine = (asked = {});
    const now = patients[control("patient").value];
    if (now !== listed) {
      const before = control("modality").value;
      control("modality").replaceChildren(...Object.keys(now.images).map((name) => new Option(now.printed[name], name)));
      control("modality").value = before in now.images ? before : now.modality;
      listed = now;
    }
    const chosen = control("modality").value;
    const volumes = await Promise.all([unpack(now.images[chosen], now), unpack(now.labels, now)]);
    if (mine !== asked) return; // another was chosen while these came
    if (now !== patient) at = [...now.start];
    [patient, image, labels] = [now, ...volumes];
    planes.forEach(draw);
    viewer.hidden = false;
    viewer.dataset.shown = `${now.id} ${chosen}`;
  }

  for (const plane of planes) {
    plane.slider.addEventListener("input", () => {
      move(plane.along, plane.slider.valueAsNumber);
      planes.forEach(draw);
    });
    plane.canvas.addEventListener("pointerdown", (event) => plane.canvas.setPointerCapture(event.pointerId));
    const point = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = plane.canvas.getBoundingClientRect();
      const [width, height] = [patient.shape[plane.right], patient.shape[plane.down]];
      const down = Math.floor(((event.clientY - box.top) / box.height) * height);
      move(plane.right, Math.floor(((event.clientX - box.left) / box.width) * width));
      move(plane.down, plane.flip ? height - 1 - down : down);
      planes.forEach(draw);
    };
    plane.canvas.addEventListener("pointerdown", point);
    plane.canvas.addEventListener("pointermove", point);
  }
  for (const name of ["patient", "modality"]) control(name).addEventListener("change", show);
  for (const name of ["reference", "prediction"]) {
    control(name).addEventListener("change", () => planes.forEach(draw));
  }
  for (const link of document.querySelectorAll("a[data-patient]")) {
    link.addEventListener("click", () => {
      control("patient").value = link.dataset.patient;
      show();
    });
  }
  show();
}
