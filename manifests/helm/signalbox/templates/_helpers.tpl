{{- /* The modes whose programs only the larger image has. */}}
{{- define "signalbox.image" -}}
{{- $tools := has .Values.mode (list "iptables" "ipvs") -}}
{{- $name := default (ternary "signalbox-iptables" "signalbox" $tools) .Values.image.repository -}}
image: {{ printf "%s:%s" $name (default .Chart.AppVersion .Values.image.tag) }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "signalbox.config" -}}
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
# What the kubelet gives to system-node-critical Pods: to be safer than that,
# signalbox would need CAP_SYS_RESOURCE.
oomScoreAdj: -997
{{- end }}
