// Gradio runs a function by its text, so each stands alone; a blank line ends one.

// gradio states no language, and a screen reader would read English with its user's voice; nor does
// it hide its icons, each of which would be a picture without a name
spoken = () => {
  document.documentElement.lang = 'en';
  const hide = () => document.querySelectorAll('svg:not([role], [aria-hidden])').forEach(
    icon => icon.setAttribute('aria-hidden', 'true'));
  new MutationObserver(hide).observe(document.body, {childList: true, subtree: true});
  hide();
}

// navigator.clipboard exists in secure contexts only: over plain http on another host than
// localhost there is just the old way
copied = async (text) => {
  if (!text) return '<p>There is nothing to copy yet.</p>';
  try { await navigator.clipboard.writeText(text); }
  catch {
    const area = document.createElement('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  return '<p>Copied.</p>';
}

// on a phone the images are below all settings
intoView = () => {
  const status = document.querySelector('#%s-status');
  setTimeout(() => innerWidth < 768 && status.scrollIntoView(), 300);
}
