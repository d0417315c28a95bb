{{- /* The modes whose programs only the larger image has. */}}
{{- define "signalbox.image" -}}
{{- $tools := eq (include "signalbox.callsIptables" .) "yes" -}}
{{- $name := default (ternary "signalbox-iptables" "signalbox" $tools) (.Values.image).repository -}}
image: {{ printf "%s/%s:%s" (default "" (.Values.image).registry) $name (default .Chart.AppVersion (.Values.image).tag) | trimPrefix "/" }}
{{- with (.Values.image).pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- /* Where the tools of iptables are called. The mode auto may come to iptables. */}}
{{- define "signalbox.callsIptables" -}}
{{- if or .Values.takeover (has .Values.mode (list "auto" "iptables" "ipvs")) }}yes{{ end }}
{{- end }}

{{- /* Where the kubelet's probes ask. */}}
{{- define "signalbox.healthzPort" -}}
{{- $at := default "0.0.0.0:10256" (.Values.config).healthzBindAddress | toString -}}
{{- if or (not (regexMatch ":[0-9]+$" $at)) (hasPrefix "127." $at) (hasPrefix "[::1]" $at) -}}
{{- fail (printf "config.healthzBindAddress %q: the kubelet asks there; it must be an address and port of the node, as in 0.0.0.0:10256" $at) -}}
{{- end -}}
{{- regexFind "[0-9]+$" $at -}}
{{- end }}

{{- define "signalbox.config" -}}
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
# The kubelet's value for system-node-critical Pods. A lower one needs
# CAP_SYS_RESOURCE.
oomScoreAdj: -997
{{- end }}

{{- /* The port at which Prometheus finds the metrics from another host. */}}
{{- define "signalbox.metricsPort" -}}
{{- $at := default "127.0.0.1:10249" (.Values.config).metricsBindAddress | toString -}}
{{- if or (not (regexMatch ":[0-9]+$" $at)) (hasPrefix "127." $at) (hasPrefix "[::1]" $at) -}}
{{- fail (printf "podMonitor.enabled: config.metricsBindAddress is %q, which Prometheus does not reach; set it to 0.0.0.0:10249" $at) -}}
{{- end -}}
{{- regexFind "[0-9]+$" $at -}}
{{- end }}
