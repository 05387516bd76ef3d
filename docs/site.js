// Each picture opens in its own size.
document.querySelectorAll("article img:not(a img)").forEach((image) => {
  const link = Object.assign(document.createElement("a"), { href: image.src, title: "open in full size" });
  image.replaceWith(link);
  link.append(image);
});
